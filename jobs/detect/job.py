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
from trimtab.cli.console import Bar, console, say
from trimtab.detection import detector
from trimtab.detection.detector import Detector, DetectorCard
from trimtab.detection.training import Learned, Parts
from trimtab.evaluation import rendering
from trimtab.evaluation.detection import pooling
from trimtab.evaluation.detection.pooling import Figures, Result
from trimtab.jobs.collect import signal_dataset
from trimtab.jobs.collect.signal_dataset import Collected
from trimtab.jobs.detect import model_selection, training_free
from trimtab.jobs.detect.config import DetectConfig
from trimtab.jobs.detect.gate import gate
from trimtab.jobs.runtime.cluster import joined
from trimtab.model import base_model
from trimtab.model.base_model import BaseModel
from trimtab.tracking import registry, runs
from trimtab.tracking.promotions import enrolled
from trimtab.tracking.registry import Version
from trimtab.tracking.runs import Run
from trimtab.util.remote_paths import folder_at


@dataclass(frozen=True)
class Detected:
    """What `trimtab detect` made: the first head saved in `folder`, the results of all heads and scores with their figures, the
    registered version, and why it is or is not champion; both None where it was not registered."""

    folder: Path
    results: list[Result]
    figures: list[Figures]
    version: Version | None
    gate: str | None

    def as_json(self) -> dict[str, Any]:
        """For `--json`: figures of the first head and of its rivals; `test` has the AUROC with its interval [low, high]."""
        head, *rivals = [_flat(pooling.as_json(r, f)) for r, f in zip(self.results, self.figures, strict=True)]
        version = asdict(self.version) if self.version else None
        made = head | {"rivals": rivals, "detector": str(self.folder), "version": version, "gate": self.gate}
        return rendering.plain(made)


def detect(config: DetectConfig) -> Detected:
    """Learn, measure, save, log and register. Raises errors of ours, before anything is learned where the data do not do."""
    registry.model_name("base", config.name)
    base = base_model.resolve(config.base, config.revision)
    data = signal_dataset.read(folder_at(config.signals), base)
    answers = training_free.seen(data)
    spread = training_free.spread(answers, config.similarity)
    tried = model_selection.trials(config.head, data, config.layers, config.settings, sampled=len(spread.unique()) > 1)
    split = model_selection.split(data, config.seeds, config.validation, config.test, config.labels, spread)
    scored = training_free.results(answers, split, config.similarity)
    run = runs.start(config.name, "detect", settings.home() / "outbox")
    with runs.closing(run), joined(config.address):
        run.params({"config": asdict(config), "base_fingerprint": base.fingerprint})
        run.inputs([_source(config, data)], "training")
        with Bar("heads", config.seeds * sum(trials.count for trials in tried.values())) as bar:
            arms = model_selection.compete(list(tried.values()), split, lambda: bar.update(bar.done + 1))
        results = [arm.result for arm in arms] + scored
        drawn = pooling.resamples(data.groups, config.seeds)
        figures = [pooling.measure(result.tests, drawn) for result in results]
        best = max(arms[0].learned, key=lambda made: made.validation)
        made = _detector(config, base, data, arms[0].result, best, split[best.seed], run)
        folder = detector.save(made, Path(config.out) if config.out else settings.runs() / f"detect-{config.name}")
        detected = Detected(folder, results, figures, None, None)
        _log(detected, run)
        if config.register:
            passed, reason = gate(config.name, config.gain, base, data, best, split[best.seed], results)
            detected = replace(detected, version=enrolled(folder, run, passed, reason), gate=reason)
    return detected


def command(config: DetectConfig) -> dict[str, Any]:
    """`trimtab detect`."""
    made = detect(config)
    title = f"made-up answers in {config.signals}: test part, mean of {config.seeds} seeds"
    console.print(table(made.results, made.figures, title))
    if made.version:
        say(f"registered {config.name} version {made.version.version} as candidate; gate: {made.gate}")
    say(f"detector: {made.folder}")
    return made.as_json()


def table(results: Sequence[Result], figures: Sequence[Figures], title: str) -> Table:
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
    config: DetectConfig, base: BaseModel, data: Collected, result: Result, best: Learned, rows: Parts, run: Run
) -> Detector:
    """The best seed's head, by validation, as an artefact."""
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
    return detector.make(best.head, rows.normaliser, best.calibration, card)


def _source(config: DetectConfig, data: Collected) -> dict[str, Any]:
    return {"name": config.signals, "digest": data.digest, "rows": len(data.keys)}


def _log(made: Detected, run: Run) -> None:
    path = made.folder / "report.json"
    path.write_text(json.dumps(made.as_json(), indent=1) + "\n")
    run.artifacts(path, "evaluation")
    run.metrics({f"test/{r.name}/auroc": f.auroc.value for r, f in zip(made.results, made.figures, strict=True)}, 0)
