"""`trimtab evaluate truth`: the whole report on detectors, for data sets that `trimtab collect` wrote.

trimtab evaluate truth --signals countries trivia
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from trimtab import heads, settings
from trimtab.cli.console import Bar, console, say
from trimtab.detection import training
from trimtab.detection.training import Parts
from trimtab.errors import UsageError
from trimtab.evaluation.detection import page, pooling
from trimtab.evaluation.detection import report as truth_report
from trimtab.evaluation.detection.pooling import Resamples, Result
from trimtab.evaluation.detection.report import DataSet, Moved, TruthReport
from trimtab.heads import Rows
from trimtab.jobs.collect import signal_dataset
from trimtab.jobs.collect.signal_dataset import Collected
from trimtab.jobs.detect import model_selection, training_free
from trimtab.jobs.detect.job import table
from trimtab.jobs.detect.model_selection import Arm, Trials
from trimtab.jobs.detect.report_config import TruthConfig
from trimtab.jobs.runtime.cluster import joined
from trimtab.jobs.runtime.config import sources
from trimtab.model import base_model
from trimtab.model.base_model import BaseModel
from trimtab.tracking import code_version, runs
from trimtab.util.remote_paths import folder_at

# FLaG without a part of it (METHODS 2).
ABLATIONS: dict[str, dict[str, Any]] = {
    "no geometry": {"geometry": False},
    "no trace": {"trace": False},
    "one group": {"groups": 1},
    "weighted mean": {"aggregate": "mean"},
}


@dataclass(frozen=True)
class Source:
    """A data set with its parts by seed, those with fewer labels by their share, and the resamples of its intervals."""

    name: str
    data: Collected
    rows: Mapping[int, Parts]
    fewer: Mapping[float, Mapping[int, Parts]]
    tried: Mapping[str, Trials]
    free: Sequence[Result]
    drawn: Resamples

    def fits(self, ablations: bool) -> int:
        """Heads that are learned for the report."""
        taught = [name for name in self.tried if heads.get(name).taught]
        cut = len(ABLATIONS) if ablations and truth_report.OURS in self.tried else 0
        every = sum(trials.count for trials in self.tried.values())
        return len(self.rows) * (every + cut + len(self.fewer) * len(taught))


def evaluate(config: TruthConfig) -> TruthReport:
    """Learn, measure, write and log. Raises errors of ours before anything is learned where data cannot be reported on."""
    base = base_model.resolve(config.base, config.revision)
    given = opened(config, base)
    folder = Path(config.out) if config.out else settings.runs() / f"truth-{config.name}"
    run = runs.start(f"evaluate truth {config.name}", "truth", settings.home() / "outbox")
    with runs.closing(run), joined(config.address):
        run.params({"truth": asdict(config)} | {"base_fingerprint": base.fingerprint})
        run.inputs([{"name": s.name, "digest": s.data.digest, "rows": len(s.data.keys)} for s in given], "evaluation")
        made = report(config, base, given)
        written = page.write(made, folder)
        run.metrics(truth_report.logged(made), 0)
        for path in written:
            run.artifacts(path, "report")
    say(f"report: {written[-1]}")
    return made


def command(config: TruthConfig) -> dict[str, Any]:
    """`trimtab evaluate truth`."""
    made = evaluate(config)
    for entry in made.sets:
        results, figures = [one.result for one in entry.lines], [one.figures for one in entry.lines]
        console.print(table(results, figures, f"made-up answers in {entry.name}: test part, mean of {made.seeds} seeds"))
        say(truth_report.sentence(entry.compared))
    return truth_report.as_json(made)


def opened(config: TruthConfig, base: BaseModel) -> list[Source]:
    """The data sets, split. Raises UsageError, naming the data set, for one that cannot be split or compared."""
    folders = list(dict.fromkeys(sources(config.signals)))
    read = {name: signal_dataset.read(folder_at(path), base) for name, path in zip(_names(folders), folders, strict=True)}
    first = next(iter(read.values()))
    if different := [name for name, data in read.items() if data.meta.layers != first.meta.layers]:
        raise UsageError(
            f"{different[0]} has layers {list(read[different[0]].meta.layers)}, the first data set {list(first.meta.layers)}: "
            "collect them with the same --layers, or report on them apart"
        )
    return [_source(config, name, data) for name, data in read.items()]


def report(config: TruthConfig, base: BaseModel, given: Sequence[Source]) -> TruthReport:
    """Learn all that the report shows, with one bar over all fits."""
    total = sum(source.fits(config.ablations) for source in given)
    with Bar("heads", total) as bar:
        made = [_data_set(source, config.ablations, lambda: bar.update(bar.done + 1)) for source in given]
    return TruthReport(
        title=f"{config.name}: detectors for {base.name}",
        base=f"{base.name} {base.fingerprint}",
        layers=given[0].data.meta.layers,
        seeds=config.seeds,
        sets=[entry for entry, _ in made],
        moved=_moved(given, [arms for _, arms in made]) if len(given) > 1 else [],
        notes=_notes(config, given),
    )


def _source(config: TruthConfig, name: str, data: Collected) -> Source:
    try:
        answers = training_free.seen(data)
        spread = training_free.spread(answers, config.similarity)
        rows = model_selection.split(data, config.seeds, config.validation, config.test, spread=spread)
        tried = model_selection.trials(config.head, data, config.layers, {}, sampled=len(spread.unique()) > 1)
        scored = training_free.results(answers, rows, config.similarity)
    except UsageError as error:
        raise UsageError(f"{name}: {error}") from error
    cut = {
        share: {seed: training.with_labels(parts, data.groups, seed, share) for seed, parts in rows.items()}
        for share in sorted(set(config.labels))
    }
    # With few labels a seed may be left with one class: that share has no point.
    fewer = {share: parts for share, parts in cut.items() if all(model_selection.two_classes(p.train) for p in parts.values())}
    return Source(name, data, rows, fewer, tried, scored, pooling.resamples(data.groups, config.seeds))


def _data_set(source: Source, ablations: bool, tick: Callable[[], None]) -> tuple[DataSet, list[Arm]]:
    """All figures on a data set, and the heads that were chosen."""
    arms = model_selection.compete(list(source.tried.values()), source.rows, tick)
    results = [arm.result for arm in arms] + list(source.free)
    cut = [r for arm in arms if arm.result.name == truth_report.OURS and ablations for r in _ablations(arm, source, tick)]
    whole, best = truth_report.ours(results), truth_report.rival(results)
    truthful = source.data.truthful
    entry = DataSet(
        name=source.name,
        digest=source.data.digest,
        answers=len(truthful),
        labelled=int((~truthful.isnan()).sum()),
        right=int((truthful == 1).sum()),
        lines=[truth_report.line(result, source.data.sources, source.drawn) for result in results],
        compared=pooling.difference(whole, best, source.drawn),
        ablations=[
            (truth_report.line(r, source.data.sources, source.drawn), pooling.difference(whole, r, source.drawn)) for r in cut
        ],
        shares=_shares(source, arms, tick),
    )
    return entry, arms


def _ablations(arm: Arm, source: Source, tick: Callable[[], None]) -> list[Result]:
    """FLaG without each of its parts, at the layers and settings that were chosen for the whole."""
    candidate = arm.learned[0].candidate
    changed = [replace(candidate, settings={**candidate.settings, **cut}) for cut in ABLATIONS.values()]
    made = model_selection.fit(changed, source.rows, tick)
    layers = source.data.meta.layers
    return [model_selection.arm(name, one, source.rows, layers).result for name, one in zip(ABLATIONS, made, strict=True)]


def _shares(source: Source, arms: Sequence[Arm], tick: Callable[[], None]) -> list[truth_report.Share]:
    """The label curves of the heads that learn from labels, each at the layers and settings that it has with all labels."""
    taught = [arm for arm in (arms if source.fewer else ()) if heads.get(arm.result.name).taught]
    candidates = [arm.learned[0].candidate for arm in taught]
    made = {share: model_selection.fit(candidates, rows, tick) for share, rows in source.fewer.items()}
    found: list[truth_report.Share] = []
    for index, arm in enumerate(taught):
        for share, rows in source.fewer.items():
            some = model_selection.arm(arm.result.name, made[share][index], rows, source.data.meta.layers)
            found.append(truth_report.share(some.result, share, source.drawn))
        found.append(truth_report.share(arm.result, 1.0, source.drawn))
    return found


def _moved(given: Sequence[Source], arms: Sequence[Sequence[Arm]]) -> list[Moved]:
    """Every head of every data set on the test parts of all."""
    found: list[Moved] = []
    for here, learned in zip(given, arms, strict=True):
        for there in given:
            places = {seed: parts.at for seed, parts in there.rows.items()}
            read = {seed: _read(there.data, at, here.rows[seed]) for seed, at in places.items()}
            for arm in learned:
                tests = [model_selection.risks(made, read[made.seed], places[made.seed]) for made in arm.learned]
                found.append(truth_report.moved(arm.result.name, here.name, there.name, tests, there.drawn))
    order = list(dict.fromkeys(arm.result.name for learned in arms for arm in learned))
    return sorted(found, key=lambda cell: order.index(cell.name))


def _read(data: Collected, at: Tensor, parts: Parts) -> Rows:
    """Answers of a data set as detectors that learned elsewhere read them."""
    return training.foreign(data.psi[at], [data.traces[i] for i in at.tolist()], data.truthful[at], parts)


def _names(folders: Sequence[str]) -> list[str]:
    """What data sets are called: their folder's name, or all of the path where two have one name."""
    short = [folder_at(folder).resolve().name for folder in folders]
    return [folder if short.count(name) > 1 else name for folder, name in zip(folders, short, strict=True)]


def _notes(config: TruthConfig, given: Sequence[Source]) -> list[str]:
    notes = [f"{config.test:.0%} of the questions test, {config.validation:.0%} choose and calibrate, the others train"]
    notes += [
        f"{source.name}: no point at {share:.0%} of the labels, where a seed's training labels are all of one class"
        for source in given
        for share in config.labels
        if share not in source.fewer
    ]
    return [*notes, code_version.line()]
