"""`trimtab detect`: detectors learned from collected signals, chosen on validation, and reported on test.

trimtab detect --signals signals --head flag --out detector
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from trimtab import base as bases
from trimtab import calibration, detector, heads, learning
from trimtab.base import BaseModel
from trimtab.console import Bar, console, say
from trimtab.detector import DetectorCard
from trimtab.errors import UsageError
from trimtab.evaluate import truth
from trimtab.evaluate.truth import Truth
from trimtab.learning import Candidate, Learned, Parts

from . import free, signal_store
from .config import sources
from .detect_config import DetectConfig
from .signal_store import Collected

ALL = "all"
# Groups of FLaG that are tried where nothing is said: few, as there are few rows (METHODS 2).
GROUPS = [4, 8, 16]


@dataclass(frozen=True)
class Result:
    """One line of the table. `by_seed` are the test figures of each seed; `oracle` the mean AUROC that choosing on test would
    have claimed, which no report may. `tokens` are generated for each answer beyond it."""

    name: str
    chosen: dict[str, Any]
    by_seed: list[Truth]
    oracle: float
    tokens: float = 0.0

    @property
    def auroc(self) -> float:
        """Mean over the seeds."""
        return mean(t.auroc.value for t in self.by_seed)

    def as_json(self) -> dict[str, Any]:
        """For `--json`: means over seeds, the interval's ends averaged too, and every seed."""
        intervals = {
            name: {key: mean(asdict(t)[name][key] for t in self.by_seed) for key in ("value", "low", "high")}
            for name in ("auroc", "auprc", "fpr95", "aurc")
        }
        flat = {name: mean(asdict(t)[name] for t in self.by_seed) for name in ("ece", "ece_raw", "count", "made_up")}
        return {"name": self.name, "chosen": self.chosen, "test": intervals | flat, "oracle_auroc": self.oracle} | {
            "tokens_generated": self.tokens,
            "seeds": [asdict(t) for t in self.by_seed],
        }


def detect(config: DetectConfig) -> tuple[list[Result], Path | None]:
    """Results of every head and score, and the folder of the detector where one was asked for. Raises errors of ours."""
    base = bases.resolve(config.base, config.revision)
    data = signal_store.read(Path(config.signals), base)
    answers = free.seen(data)
    spread = free.spread(answers, config.similarity)
    names = sources(config.head)
    if names == [ALL]:
        # Without samples there is nothing that sep could learn; who asks for it by name is told so.
        names = [name for name in heads.names() if name != "sep" or len(spread.unique()) > 1]
    plans = {name: candidates(config, name, data, first=name == names[0]) for name in names}
    split = {seed: _parts(config, data, seed, spread) for seed in range(config.seeds)}
    results: list[Result] = []
    best: Learned | None = None
    with Bar("heads", config.seeds * sum(map(len, plans.values()))) as bar:
        done = 0
        for name, tried in plans.items():
            learned: dict[int, list[Learned]] = {}
            for index, candidate in enumerate(tried):
                learned[index] = [learning.learn(candidate, rows, seed) for seed, rows in split.items()]
                done += config.seeds
                bar.update(done)
            result, chosen = _chosen(name, learned, split)
            results.append(result)
            best = best or max(chosen, key=lambda made: made.validation)
    results += [
        Result(score.name, {}, score.by_seed, mean(t.auroc.value for t in score.by_seed), score.tokens)
        for score in free.scored(answers, split, config.similarity)
    ]
    folder = _save(config, base, data, best, split, results[0]) if config.out and best else None
    return results, folder


def command(config: DetectConfig) -> dict[str, Any]:
    """`trimtab detect`."""
    results, folder = detect(config)
    console.print(table(results, f"made-up answers in {config.signals}: test part, mean of {config.seeds} seeds"))
    if folder:
        say(f"detector: {folder}")
    head, *rivals = [r.as_json() for r in results]
    return head | {"rivals": rivals, "detector": str(folder) if folder else None}


def candidates(config: DetectConfig, name: str, data: Collected, *, first: bool) -> list[Candidate]:
    """What is tried for a head: each layer alone, all together, and each choice of settings."""
    there = data.meta.layers
    if unknown := [layer for layer in config.layers if layer not in there]:
        raise UsageError(f"layer {unknown[0]} was not collected; there are {', '.join(map(str, there))}")
    indices = [there.index(layer) for layer in (config.layers or there)]
    sets = [(index,) for index in indices] + ([tuple(indices)] if len(indices) > 1 else [])
    given = config.settings if first else {}
    choices = ({"groups": GROUPS} if name == "flag" else {}) | given
    lists = [value if isinstance(value, list) else [value] for value in choices.values()]
    settings = [dict(zip(choices, values, strict=True)) for values in product(*lists)]
    return [Candidate(name, layers, chosen) for layers in sets for chosen in settings]


def table(results: Sequence[Result], title: str) -> Table:
    """One line for each head and score."""
    shown = Table(title=title, title_justify="left")
    for column in ("", "AUROC", "AUPRC", "FPR at 95 % caught", "ECE", "before", "chosen on test", "tokens"):
        shown.add_column(column, no_wrap=True)
    for r in results:
        means = r.as_json()["test"]
        auroc = "{value:.3f} [{low:.3f}, {high:.3f}]".format(**means["auroc"])
        figures = [f"{means[name]['value']:.3f}" for name in ("auprc", "fpr95")]
        shown.add_row(
            r.name, auroc, *figures, f"{means['ece']:.3f}", f"{means['ece_raw']:.3f}", f"{r.oracle:.3f}", f"{r.tokens:.1f}"
        )
    return shown


def _parts(config: DetectConfig, data: Collected, seed: int, spread: Tensor) -> Parts:
    return learning.parts(
        data.psi, data.traces, data.truthful, data.questions, seed, config.validation, config.test, config.labels, spread
    )


def _chosen(name: str, learned: Mapping[int, Sequence[Learned]], split: Mapping[int, Parts]) -> tuple[Result, list[Learned]]:
    """The candidate with the best mean AUROC on validation, its test figures, and what the best on test would have claimed."""
    best = max(learned, key=lambda index: mean(made.validation for made in learned[index]))
    oracle = max(mean(_ranked(made, split[made.seed]) for made in each) for each in learned.values())
    candidate = learned[best][0].candidate
    chosen = {"layers": list(candidate.layers), **candidate.settings}
    return Result(name, chosen, [_measure(made, split[made.seed]) for made in learned[best]], oracle), list(learned[best])


def _ranked(made: Learned, rows: Parts) -> float:
    """AUROC on test."""
    test = learning.seen(rows.test, made.candidate)
    return heads.auroc(heads.scores(made.head, test), test.truthful)


def _measure(made: Learned, rows: Parts) -> Truth:
    test = learning.seen(rows.test, made.candidate)
    score = heads.scores(made.head, test)
    raw = torch.sigmoid(-score)
    return truth.measure(_numbers(calibration.risk(score, made.calibration)), _made_up(test.truthful), _numbers(raw), made.seed)


def _save(
    config: DetectConfig, base: BaseModel, data: Collected, best: Learned, split: Mapping[int, Parts], result: Result
) -> Path:
    """The best seed's head, by validation, as an artefact."""
    rows = split[best.seed]
    card = DetectorCard(
        name=config.name,
        base=base.name,
        fingerprint=base.fingerprint,
        layers=[data.meta.layers[index] for index in best.candidate.layers],
        width=base.width,
        head=best.candidate.head,
        settings=dict(best.candidate.settings),
        low=rows.low,
        thresholds=best.thresholds,
        prefix=data.meta.prefix,
        method={"seed": best.seed, "seeds": config.seeds, "validation": config.validation, "test": config.test},
        data=[{"name": config.signals, "digest": data.digest, "rows": len(data.keys)}],
        metrics={"test_auroc": result.auroc, "validation_auroc": best.validation},
    )
    return detector.save(detector.make(best.head, rows.normaliser, best.calibration, card), Path(str(config.out)))


def _numbers(values: Tensor) -> truth.Floats:
    return values.double().numpy()


def _made_up(truthful: Tensor) -> truth.Labels:
    return (truthful == 0).numpy()
