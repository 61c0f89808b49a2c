"""`trimtab detect`: detectors learned from collected signals, chosen on validation, and reported on test.

trimtab detect --signals signals --head flag --out detector
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from trimtab import base as bases
from trimtab import detector
from trimtab.base import BaseModel
from trimtab.console import Bar, console, say
from trimtab.detector import DetectorCard
from trimtab.evaluate import pooled
from trimtab.evaluate.pooled import Figures, Result
from trimtab.learning import Parts

from . import free, over_seeds, signal_store
from .detect_config import DetectConfig
from .over_seeds import Arm
from .signal_store import Collected


def detect(config: DetectConfig) -> tuple[list[Result], list[Figures], Path | None]:
    """Results of every head and score with their figures, and the folder of the detector where one was asked for. Raises errors
    of ours."""
    base = bases.resolve(config.base, config.revision)
    data = signal_store.read(Path(config.signals), base)
    answers = free.seen(data)
    spread = free.spread(answers, config.similarity)
    tried = over_seeds.trials(config.head, data, config.layers, config.settings, sampled=len(spread.unique()) > 1)
    split = over_seeds.split(data, config.seeds, config.validation, config.test, config.labels, spread)
    with Bar("heads", config.seeds * sum(trials.count for trials in tried.values())) as bar:
        arms = [over_seeds.compete(trials, split, lambda: bar.update(bar.done + 1)) for trials in tried.values()]
    results = [arm.result for arm in arms] + free.results(answers, split, config.similarity)
    drawn = pooled.resamples(data.groups, config.seeds)
    figures = [pooled.measure(result.tests, drawn) for result in results]
    folder = _save(config, base, data, arms, split) if config.out else None
    return results, figures, folder


def command(config: DetectConfig) -> dict[str, Any]:
    """`trimtab detect`."""
    results, figures, folder = detect(config)
    console.print(table(results, figures, f"made-up answers in {config.signals}: test part, mean of {config.seeds} seeds"))
    if folder:
        say(f"detector: {folder}")
    head, *rivals = [pooled.as_json(r, f) for r, f in zip(results, figures, strict=True)]
    return head | {"rivals": rivals, "detector": str(folder) if folder else None}


def table(results: Sequence[Result], figures: Sequence[Figures], title: str) -> Table:
    """One line for each head and score."""
    shown = Table(title=title, title_justify="left")
    for column in ("", "AUROC", "AUPRC", "FPR at 95 % caught", "ECE", "before", "chosen on test", "tokens"):
        shown.add_column(column, no_wrap=True)
    for r, f in zip(results, figures, strict=True):
        numbers = (f.auprc.value, f.fpr95.value, f.ece, f.ece_raw, r.oracle)
        shown.add_row(r.name, str(f.auroc), *(f"{number:.3f}" for number in numbers), f"{r.tokens:.1f}")
    return shown


def _save(config: DetectConfig, base: BaseModel, data: Collected, arms: Sequence[Arm], split: Mapping[int, Parts]) -> Path:
    """The best seed's head, by validation, as an artefact."""
    best = max(arms[0].learned, key=lambda made: made.validation)
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
        metrics={"test_auroc": arms[0].result.auroc, "validation_auroc": best.validation},
    )
    return detector.save(detector.make(best.head, rows.normaliser, best.calibration, card), Path(str(config.out)))
