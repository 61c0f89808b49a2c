"""`trimtab detect`: detectors learned from collected signals, chosen on validation, and reported on test.

trimtab detect --signals signals --head flag --out detector
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from trimtab import settings
from trimtab.cli.console import ProgressBar, console, print_line
from trimtab.detection.detector import Detector, DetectorCard, build_detector, save_detector
from trimtab.detection.training import DataSplits, TrainedDetector
from trimtab.evaluation.detection.pooling import DetectorResult, PooledMetrics, draw_resamples, measure_result, result_as_json
from trimtab.evaluation.rendering import plain
from trimtab.jobs.collect.signal_dataset import SignalDataset, read_dataset
from trimtab.jobs.detect.config import DetectConfig
from trimtab.jobs.detect.gate import check_gate
from trimtab.jobs.detect.model_selection import list_trials, select_models, split_by_seed
from trimtab.jobs.detect.training_free import build_score_inputs, compute_semantic_entropies, measure_training_free
from trimtab.jobs.runtime.cluster import ray_session
from trimtab.model.base_model import BaseModel, resolve_base_model
from trimtab.tracking import registry, runs
from trimtab.tracking.promotions import register_and_promote
from trimtab.tracking.registry import Version
from trimtab.tracking.runs import TrackedRun
from trimtab.util.remote_paths import open_folder


@dataclass(frozen=True)
class DetectResult:
    """What `trimtab detect` made: the first head saved in `folder`, the results of all heads and scores with their figures, the
    registered version, and why it is or is not champion; both None where it was not registered."""

    folder: Path
    results: list[DetectorResult]
    figures: list[PooledMetrics]
    version: Version | None
    gate: str | None

    def as_json(self) -> dict[str, Any]:
        """For `--json`: figures of the first head and of its rivals; `test` has the AUROC with its interval [low, high]."""
        head, *rivals = [_flat(result_as_json(r, f)) for r, f in zip(self.results, self.figures, strict=True)]
        version = asdict(self.version) if self.version else None
        made = head | {"rivals": rivals, "detector": str(self.folder), "version": version, "gate": self.gate}
        return plain(made)


def train_detectors(config: DetectConfig) -> DetectResult:
    """Learn, measure, save, log and register. Raises errors of ours, before anything is learned where the data do not do."""
    registry.format_model_name("base", config.name)
    base = resolve_base_model(config.base, config.revision)
    data = read_dataset(open_folder(config.signals), base)
    answers = build_score_inputs(data)
    spread = compute_semantic_entropies(answers, config.similarity)
    tried = list_trials(config.head, data, config.layers, config.settings, sampled=len(spread.unique()) > 1)
    split = split_by_seed(data, config.seeds, config.validation, config.test, config.labels, spread)
    scored = measure_training_free(answers, split, config.similarity)
    run = runs.start_run(config.name, "detect", settings.get_home() / "outbox")
    with runs.close_run(run), ray_session(config.address):
        run.log_params({"config": asdict(config), "base_fingerprint": base.fingerprint})
        run.log_inputs([_source(config, data)], "training")
        with ProgressBar("heads", config.seeds * sum(trials.count for trials in tried.values())) as bar:
            arms = select_models(list(tried.values()), split, lambda: bar.update(bar.done + 1))
        results = [arm.result for arm in arms] + scored
        drawn = draw_resamples(data.groups, config.seeds)
        figures = [measure_result(result.tests, drawn) for result in results]
        best = max(arms[0].learned, key=lambda made: made.validation)
        made = _detector(config, base, data, arms[0].result, best, split[best.seed], run)
        folder = save_detector(made, Path(config.out) if config.out else settings.get_runs_folder() / f"detect-{config.name}")
        detected = DetectResult(folder, results, figures, None, None)
        _log(detected, run)
        if config.register:
            passed, reason = check_gate(config.name, config.gain, base, data, best, split[best.seed], results)
            detected = replace(detected, version=register_and_promote(folder, run, passed, reason), gate=reason)
    return detected


def run_detect(config: DetectConfig) -> dict[str, Any]:
    """`trimtab detect`."""
    made = train_detectors(config)
    title = f"made-up answers in {config.signals}: test part, mean of {config.seeds} seeds"
    console.print(build_table(made.results, made.figures, title))
    if made.version:
        print_line(f"registered {config.name} version {made.version.version} as candidate; gate: {made.gate}")
    print_line(f"detector: {made.folder}")
    return made.as_json()


def build_table(results: Sequence[DetectorResult], figures: Sequence[PooledMetrics], title: str) -> Table:
    """One line for each head and score."""
    shown = Table(title=title, title_justify="left")
    for column in ("", "AUROC", "AUPRC", "FPR at 95 % caught", "ECE", "before", "chosen on test", "tokens"):
        shown.add_column(column, no_wrap=True)
    for r, f in zip(results, figures, strict=True):
        numbers = (f.auprc.value, f.fpr95.value, f.ece, f.ece_raw, r.oracle)
        shown.add_row(r.name, str(f.auroc), *(f"{number:.3f}" for number in numbers), f"{r.tokens:.1f}")
    return shown


def _flat(entry: dict[str, Any]) -> dict[str, Any]:
    """An arm's figures as numbers, with the interval of the first."""
    test = entry["test"]
    numbers = {name: figure["value"] if isinstance(figure, dict) else figure for name, figure in test.items()}
    return entry | {"test": numbers | {"interval": [test["auroc"]["low"], test["auroc"]["high"]]}}


def _detector(
    config: DetectConfig,
    base: BaseModel,
    data: SignalDataset,
    result: DetectorResult,
    best: TrainedDetector,
    rows: DataSplits,
    run: TrackedRun,
) -> Detector:
    """The best seed's head, by validation, as an artifact."""
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
        data=[_source(config, data)],
        metrics={"test_auroc": result.auroc, "validation_auroc": best.validation},
        run_id=run.run_id,
    )
    return build_detector(best.head, rows.normalizer, best.calibration, card)


def _source(config: DetectConfig, data: SignalDataset) -> dict[str, Any]:
    return {"name": config.signals, "digest": data.digest, "rows": len(data.keys)}


def _log(made: DetectResult, run: TrackedRun) -> None:
    path = made.folder / "report.json"
    path.write_text(json.dumps(made.as_json(), indent=1) + "\n")
    run.log_artifacts(path, "evaluation")
    run.log_metrics({f"test/{r.name}/auroc": f.auroc.value for r, f in zip(made.results, made.figures, strict=True)}, 0)
