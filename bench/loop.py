"""Feedback loop: traffic shifts to other questions, and labels of stored answers bring the detector back.

python bench/loop.py [--first FOLDER --then FOLDER] [--quick] [--json FILE]

The signals are collected once from a real model and replayed as live traffic: first answers like those that the champion was
trained on, then others. By default these are questions for capitals, then for currencies; `--first` and `--then` name other
data sets of `trimtab collect`. Stored answers, labels, training, gate and registry are those of the product.

Measured are the delay of the drift alarm, the run length without a shift, the AUROC on held-out answers of the new kind for
each number of labels, whether the gate promotes, the time from the first label to the promotion,
and the effect of a rater who lies.
"""

import argparse
import json
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from peers.homes import own_home
from torch import Tensor

from trimtab.detection.detector import Detector
from trimtab.detection.drift import detect_drift, fit_distance, get_states
from trimtab.detection.live_labels import LIVE_SOURCE, LabelJournal, LiveLabel, format_answer_key
from trimtab.detection.signal_dataset import SignalDataset, read_dataset
from trimtab.detection.signal_files import append_part, begin_dataset
from trimtab.heads import compute_auroc
from trimtab.jobs.collect.config import CollectConfig
from trimtab.jobs.collect.job import collect
from trimtab.jobs.detect.config import DetectConfig
from trimtab.jobs.detect.job import train_detectors
from trimtab.jobs.promote.detector_metrics import compute_risk_at
from trimtab.jobs.refresh.config import RefreshConfig
from trimtab.jobs.refresh.job import refresh_detector
from trimtab.jobs.runtime.cluster import ray_session
from trimtab.model.base_model import BaseModel, resolve_base_model
from trimtab.stats.change_detection import detect_change
from trimtab.tracking import registry

LABELS, QUICK_LABELS = (50, 100, 200, 400), (100,)
SEEDS, QUICK_SEEDS = 5, 1
# Shares of the groups: training of the champion, of the first kind; held-out test, of the second kind.
TRAIN_SHARE, TEST_SHARE = 0.6, 0.35
# Goals: answers until the alarm after the shift, and distance to a detector that is trained on as many labels of the new kind.
MOST_ANSWERS, MOST_LOSS = 500, 0.02
RUN_LENGTH = 1000.0
RUNS, RUN_ANSWERS = 100, 4000
# Share of the labels that one rater gives, and of these that are wrong.
LIAR_SHARE, LIE_SHARE = 0.5, 0.3
HOUR = 3600.0


@dataclass(frozen=True)
class Kinds:
    """Rows of both kinds of answers for one seed.

    Attributes:
        first: data set of the first kind.
        then: data set of the second kind.
        train: rows of the first kind that the champion is trained on.
        before: rows of the first kind that are traffic before the shift.
        after: rows of the second kind that are traffic after the shift.
        test: rows of the second kind that are held out.
    """

    first: SignalDataset
    then: SignalDataset
    train: Tensor
    before: Tensor
    after: Tensor
    test: Tensor


def main() -> None:
    options = parse_arguments()
    labels, seeds = (QUICK_LABELS, QUICK_SEEDS) if options.quick else (LABELS, SEEDS)
    with tempfile.TemporaryDirectory(prefix="loop-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        own_home(folder / "home")
        base = resolve_base_model(options.base)
        first, then = read_kinds(options, base, folder)
        lines: list[dict[str, Any]] = []
        samples: dict[str, list[float]] = {}
        with ray_session(None):
            for seed in range(seeds):
                kinds = split_kinds(first, then, seed)
                for line_name, value in run_seed(base, kinds, labels, folder / f"seed{seed}", seed).items():
                    samples.setdefault(line_name, []).append(value)
                    print(f"seed {seed}: {line_name} {value:.3f}", flush=True)
        lines += [build_line(line_name, values) for line_name, values in samples.items()]
        lines.append(measure_run_length(split_kinds(first, then, 0)))
    print(json.dumps(lines, indent=1))
    if options.json:
        Path(options.json).write_text(json.dumps(lines, indent=1) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", help="data set of trimtab collect: answers before the shift")
    parser.add_argument("--then", help="data set of trimtab collect: answers after the shift")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_SEEDS} seed and {QUICK_LABELS[0]} labels")
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--base", default="smollm2-135m")
    return parser.parse_args()


def read_kinds(options: argparse.Namespace, base: BaseModel, folder: Path) -> tuple[SignalDataset, SignalDataset]:
    """Read the labeled answers of both kinds, or collect those to questions about countries."""
    if options.first and options.then:
        sets = [read_dataset(Path(path), base) for path in (options.first, options.then)]
    else:
        collect(CollectConfig(questions="trimtab:countries", out=str(folder / "countries"), base=options.base))
        data = read_dataset(folder / "countries", base)
        sets = [
            data.select_rows(torch.tensor([source == kind for source in data.sources])) for kind in ("capitals", "currencies")
        ]
    first, then = (data.select_rows(~data.truthful.isnan()) for data in sets)
    return first, then


def split_kinds(first: SignalDataset, then: SignalDataset, seed: int) -> Kinds:
    """Split both kinds by group, in the random order of a seed."""
    train, before = _split(first, TRAIN_SHARE, seed)
    test, after = _split(then, TEST_SHARE, seed)
    return Kinds(first, then, train, before, after, test)


def run_seed(base: BaseModel, kinds: Kinds, labels: Sequence[int], folder: Path, seed: int) -> dict[str, float]:
    """Train a champion, replay the shift, and refresh the champion with each number of labels."""
    values: dict[str, float] = {}
    collected = write_collected(folder / "collected", kinds.first, kinds.train)
    detected = train(base, f"champion-{seed}", [collected], folder)
    champion = registry.load_detector(registry.find_version(base.name, f"champion-{seed}", "candidate"), base)
    values["AUROC before the shift, champion"] = measure_auroc(champion, kinds.first, kinds.before)
    values["AUROC after the shift, champion"] = measure_auroc(champion, kinds.then, kinds.test)
    values["answers until the alarm"] = measure_delay(champion, kinds, detected)
    for count in (count for count in labels if count <= len(kinds.after)):
        for case in ("honest", "client lies", "trusted rater lies"):
            if case != "honest" and count != max(n for n in labels if n <= len(kinds.after)):
                continue
            name = f"loop-{seed}-{count}-{case.replace(' ', '-')}"
            train(base, name, [collected], folder / name)
            live = write_live(folder / name / "signals", kinds.then, kinds.after[:count], case, seed)
            started = time.perf_counter()
            refreshed = refresh(base, name, [collected, live])
            seconds = time.perf_counter() - started
            version = registry.find_version(base.name, name, "candidate")
            suffix = f"{count} labels" if case == "honest" else f"{count} labels, {case}"
            values[f"AUROC, {suffix}"] = measure_auroc(registry.load_detector(version, base), kinds.then, kinds.test)
            values[f"promoted, {suffix}"] = float(refreshed == "promoted")
            if case == "honest":
                values[f"seconds to the decision, {suffix}"] = seconds
                alone = write_collected(folder / name / "alone", kinds.then, kinds.after[:count])
                train(base, f"alone-{seed}-{count}", [alone], folder / name)
                rival = registry.load_detector(registry.find_version(base.name, f"alone-{seed}-{count}", "candidate"), base)
                own = measure_auroc(rival, kinds.then, kinds.test)
                values[f"AUROC, {suffix}, trained on these alone"] = own
                values[f"loss against these alone, {suffix}"] = own - values[f"AUROC, {suffix}"]
    return values


def train(base: BaseModel, name: str, folders: Sequence[Path], out: Path) -> SignalDataset:
    """Train and register a detector; return its data set."""
    signals = [str(folder) for folder in folders]
    # Of few labels, a tenth would often be of one class.
    config = DetectConfig(signals, "linear", num_seeds=1, name=name, out=str(out / name), base=base.name)
    train_detectors(replace(config, validation_fraction=0.25, test_fraction=0.25))
    return read_dataset(folders[0], base)


def refresh(base: BaseModel, name: str, folders: Sequence[Path]) -> str:
    """Refresh a detector without a shadow phase, and return the state."""
    config = RefreshConfig(
        name, signals=[str(folder) for folder in folders], min_labels=1, shadow_answers=0, num_seeds=1, base=base.name
    )
    return refresh_detector(config).status


def write_collected(folder: Path, data: SignalDataset, rows: Tensor) -> Path:
    """Write rows as a collected data set."""
    begin_dataset(folder, data.meta)
    append_part(folder, data.meta, [_build_row(data, row, data.keys[row], data.groups[row]) for row in rows.tolist()])
    return folder


def write_live(folder: Path, data: SignalDataset, rows: Tensor, case: str, seed: int) -> Path:
    """Write rows as answers that a server has stored, and their labels; one rater may lie."""
    meta = replace(data.meta, settings=json.dumps({"source": LIVE_SOURCE}))
    begin_dataset(folder / "base", meta)
    journal, generator = LabelJournal(folder, "bench"), random.Random(seed)
    stored: list[dict[str, Any]] = []
    for number, row in enumerate(rows.tolist()):
        request_id = f"{generator.getrandbits(128):032x}"
        written = _build_row(data, row, format_answer_key(request_id, 0), request_id)
        signals = {name: np.array(written[name], dtype=np.float16) for name in ("psi", "history")}
        stored.append(written | signals | {"question": "", "answer": "", "truthful": None, "at": HOUR * number})
        lies = case != "honest" and generator.random() < LIAR_SHARE
        correct = bool(data.truthful[row] == 1) != (lies and generator.random() < LIE_SHARE)
        trusted = not lies or case == "trusted rater lies"
        journal.append_label(LiveLabel(request_id, 0, correct, "liar" if lies else "ann", trusted, HOUR * number + 60))
    append_part(folder / "base", meta, stored, halved=True)
    return folder / "base"


def measure_auroc(detector: Detector, data: SignalDataset, rows: Tensor) -> float:
    """Measure the AUROC of a detector on labeled rows."""
    return compute_auroc(-compute_risk_at(detector, data, rows), data.truthful[rows])


def measure_delay(champion: Detector, kinds: Kinds, trained: SignalDataset) -> float:
    """Return the number of answers between the shift and the alarm; infinity without one, negative for a false alarm."""
    # The champion's risks of its own training rows are too low, so that the states decide: the risk is constant.
    stream = [kinds.first.select_rows(kinds.before), kinds.then.select_rows(kinds.after)]
    count = sum(len(data.keys) for data in stream)
    live = replace(
        stream[0],
        psi=torch.cat([data.psi for data in stream]),
        keys=[key for data in stream for key in data.keys],
        times=torch.arange(count, dtype=torch.double),
    )
    layer = max(champion.card.layers)
    result = detect_drift(trained, torch.zeros(len(trained.keys)), live, torch.zeros(count), layer, 10_000)
    return float("inf") if result.alarm is None else float(result.alarm - len(kinds.before))


def measure_run_length(kinds: Kinds) -> dict[str, Any]:
    """Measure the number of answers until an alarm without a shift; runs without one count with their length.

    Reference and traffic are drawn with replacement from the same answers, since two samples of a data set differ by chance.
    """
    states = get_states(kinds.first, kinds.first.meta.layers[-1])
    half = len(states) // 2
    statistics = np.stack([values.numpy() for values in fit_distance(states[:half]).list_statistics(states[half:])])
    lengths: list[int] = []
    for run in range(RUNS):
        generator = np.random.default_rng(run)
        reference, stream = (statistics[:, generator.integers(statistics.shape[1], size=n)] for n in (half, RUN_ANSWERS))
        lengths.append(detect_change(list(reference), list(stream), RUN_LENGTH, run).alarm or RUN_ANSWERS)
    error = 1.96 * stdev(lengths) / len(lengths) ** 0.5
    line = {"name": "answers until a false alarm", "value": mean(lengths), "unit": "answers", "peer": None, "ratio": None}
    met = True if mean(lengths) - error > RUN_LENGTH else None
    return line | {"low": mean(lengths) - error, "high": mean(lengths) + error, "goal": RUN_LENGTH, "met": met}


def build_line(name: str, values: Sequence[float]) -> dict[str, Any]:
    """Build the line of a figure, with its range over the seeds."""
    line = {"name": name, "value": mean(values), "unit": "", "peer": None, "ratio": None, "by_seed": list(values)}
    goals = {"answers until the alarm": MOST_ANSWERS, "loss against these alone": MOST_LOSS}
    goal = next((value for start, value in goals.items() if name.startswith(start)), None)
    met = None if goal is None else all(value <= goal for value in values)
    return line | {"low": min(values), "high": max(values), "goal": goal, "met": met}


def _split(data: SignalDataset, share: float, seed: int) -> tuple[Tensor, Tensor]:
    groups = sorted(set(data.groups))
    random.Random(seed).shuffle(groups)
    chosen = set(groups[: round(share * len(groups))])
    is_in = torch.tensor([group in chosen for group in data.groups])
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(data.groups)))
    return order[is_in[order]], order[~is_in[order]]


def _build_row(data: SignalDataset, row: int, key: str, group: str) -> dict[str, Any]:
    return {
        "key": key,
        "question": data.questions[row],
        "source": data.sources[row],
        "group": group,
        "answer": data.answers[row],
        "truthful": bool(data.truthful[row] == 1),
        "why": "",
        "tokens": len(data.traces[row]),
        "whole": data.finished[row],
        "psi": data.psi[row].flatten().tolist(),
        "history": data.traces[row].flatten().tolist(),
    }


if __name__ == "__main__":
    main()
