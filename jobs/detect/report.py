"""`trimtab evaluate truth`: the whole report on detectors, for data sets that `trimtab collect` wrote.

trimtab evaluate truth --signals countries trivia
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from trimtab import heads, settings
from trimtab.cli.console import ProgressBar, console, print_line
from trimtab.detection.training import DataSplits, build_foreign_rows, drop_labels
from trimtab.errors import UsageError
from trimtab.evaluation.detection.page import write_report
from trimtab.evaluation.detection.pooling import DetectorResult, Resamples, draw_resamples, estimate_difference
from trimtab.evaluation.detection.report import (
    OURS,
    DataSetReport,
    DetectionReport,
    LabelShare,
    TransferResult,
    build_label_share,
    build_line,
    build_transfer,
    format_comparison,
    get_best_head,
    get_best_rival,
    get_logged_metrics,
    report_as_json,
)
from trimtab.heads import DetectorRows
from trimtab.jobs.collect.signal_dataset import SignalDataset, read_dataset
from trimtab.jobs.detect.job import build_table
from trimtab.jobs.detect.model_selection import (
    HeadTrials,
    SelectedModel,
    build_selected_model,
    compute_test_risks,
    fit_candidates,
    has_two_classes,
    list_trials,
    select_models,
    split_by_seed,
)
from trimtab.jobs.detect.report_config import TruthConfig
from trimtab.jobs.detect.training_free import build_score_inputs, compute_semantic_entropies, measure_training_free
from trimtab.jobs.runtime.cluster import ray_session
from trimtab.jobs.runtime.config import as_source_list
from trimtab.model.base_model import BaseModel, resolve_base_model
from trimtab.tracking import runs
from trimtab.tracking.code_version import format_code_version
from trimtab.util.remote_paths import open_folder

# FLaG without a part of it (METHODS 2).
ABLATIONS: dict[str, dict[str, Any]] = {
    "no geometry": {"geometry": False},
    "no trace": {"trace": False},
    "one group": {"groups": 1},
    "weighted mean": {"aggregate": "mean"},
}


@dataclass(frozen=True)
class ReportSource:
    """A data set with its parts by seed, those with fewer labels by their share, and the resamples of its intervals."""

    name: str
    data: SignalDataset
    rows: Mapping[int, DataSplits]
    fewer: Mapping[float, Mapping[int, DataSplits]]
    tried: Mapping[str, HeadTrials]
    free: Sequence[DetectorResult]
    drawn: Resamples

    def fits(self, ablations: bool) -> int:
        """Heads that are learned for the report."""
        taught = [name for name in self.tried if heads.get_head(name).taught]
        cut = len(ABLATIONS) if ablations and OURS in self.tried else 0
        every = sum(trials.count for trials in self.tried.values())
        return len(self.rows) * (every + cut + len(self.fewer) * len(taught))


def evaluate_detectors(config: TruthConfig) -> DetectionReport:
    """Learn, measure, write and log. Raises errors of ours before anything is learned where data cannot be reported on."""
    base = resolve_base_model(config.base, config.revision)
    given = open_sources(config, base)
    folder = Path(config.out) if config.out else settings.get_runs_folder() / f"truth-{config.name}"
    run = runs.start_run(f"evaluate truth {config.name}", "truth", settings.get_home() / "outbox")
    with runs.close_run(run), ray_session(config.address):
        run.log_params({"truth": asdict(config)} | {"base_fingerprint": base.fingerprint})
        run.log_inputs([{"name": s.name, "digest": s.data.digest, "rows": len(s.data.keys)} for s in given], "evaluation")
        made = build_report(config, base, given)
        written = write_report(made, folder)
        run.log_metrics(get_logged_metrics(made), 0)
        for path in written:
            run.log_artifacts(path, "report")
    print_line(f"report: {written[-1]}")
    return made


def run_evaluate_truth(config: TruthConfig) -> dict[str, Any]:
    """`trimtab evaluate truth`."""
    made = evaluate_detectors(config)
    for entry in made.sets:
        results, figures = [one.result for one in entry.lines], [one.figures for one in entry.lines]
        console.print(build_table(results, figures, f"made-up answers in {entry.name}: test part, mean of {made.seeds} seeds"))
        print_line(format_comparison(entry.compared))
    return report_as_json(made)


def open_sources(config: TruthConfig, base: BaseModel) -> list[ReportSource]:
    """The data sets, split. Raises UsageError, naming the data set, for one that cannot be split or compared."""
    folders = list(dict.fromkeys(as_source_list(config.signals)))
    read = {name: read_dataset(open_folder(path), base) for name, path in zip(_names(folders), folders, strict=True)}
    first = next(iter(read.values()))
    if different := [name for name, data in read.items() if data.meta.layers != first.meta.layers]:
        raise UsageError(
            f"{different[0]} has layers {list(read[different[0]].meta.layers)}, the first data set {list(first.meta.layers)}: "
            "collect them with the same --layers, or report on them apart"
        )
    return [_source(config, name, data) for name, data in read.items()]


def build_report(config: TruthConfig, base: BaseModel, given: Sequence[ReportSource]) -> DetectionReport:
    """Learn all that the report shows, with one bar over all fits."""
    total = sum(source.fits(config.ablations) for source in given)
    with ProgressBar("heads", total) as bar:
        made = [_data_set(source, config.ablations, lambda: bar.update(bar.done + 1)) for source in given]
    return DetectionReport(
        title=f"{config.name}: detectors for {base.name}",
        base=f"{base.name} {base.fingerprint}",
        layers=given[0].data.meta.layers,
        seeds=config.seeds,
        sets=[entry for entry, _ in made],
        moved=_moved(given, [arms for _, arms in made]) if len(given) > 1 else [],
        notes=_notes(config, given),
    )


def _source(config: TruthConfig, name: str, data: SignalDataset) -> ReportSource:
    try:
        answers = build_score_inputs(data)
        spread = compute_semantic_entropies(answers, config.similarity)
        rows = split_by_seed(data, config.seeds, config.validation, config.test, spread=spread)
        tried = list_trials(config.head, data, config.layers, {}, sampled=len(spread.unique()) > 1)
        scored = measure_training_free(answers, rows, config.similarity)
    except UsageError as error:
        raise UsageError(f"{name}: {error}") from error
    cut = {
        share: {seed: drop_labels(parts, data.groups, seed, share) for seed, parts in rows.items()}
        for share in sorted(set(config.labels))
    }
    # With few labels a seed may be left with one class: that share has no point.
    fewer = {share: parts for share, parts in cut.items() if all(has_two_classes(p.train) for p in parts.values())}
    return ReportSource(name, data, rows, fewer, tried, scored, draw_resamples(data.groups, config.seeds))


def _data_set(source: ReportSource, ablations: bool, tick: Callable[[], None]) -> tuple[DataSetReport, list[SelectedModel]]:
    """All figures on a data set, and the heads that were chosen."""
    arms = select_models(list(source.tried.values()), source.rows, tick)
    results = [arm.result for arm in arms] + list(source.free)
    cut = [r for arm in arms if arm.result.name == OURS and ablations for r in _ablations(arm, source, tick)]
    whole, best = get_best_head(results), get_best_rival(results)
    truthful = source.data.truthful
    entry = DataSetReport(
        name=source.name,
        digest=source.data.digest,
        answers=len(truthful),
        labelled=int((~truthful.isnan()).sum()),
        right=int((truthful == 1).sum()),
        lines=[build_line(result, source.data.sources, source.drawn) for result in results],
        compared=estimate_difference(whole, best, source.drawn),
        ablations=[
            (build_line(r, source.data.sources, source.drawn), estimate_difference(whole, r, source.drawn)) for r in cut
        ],
        shares=_shares(source, arms, tick),
    )
    return entry, arms


def _ablations(arm: SelectedModel, source: ReportSource, tick: Callable[[], None]) -> list[DetectorResult]:
    """FLaG without each of its parts, at the layers and settings that were chosen for the whole."""
    candidate = arm.learned[0].candidate
    changed = [replace(candidate, settings={**candidate.settings, **cut}) for cut in ABLATIONS.values()]
    made = fit_candidates(changed, source.rows, tick)
    layers = source.data.meta.layers
    return [build_selected_model(name, one, source.rows, layers).result for name, one in zip(ABLATIONS, made, strict=True)]


def _shares(source: ReportSource, arms: Sequence[SelectedModel], tick: Callable[[], None]) -> list[LabelShare]:
    """The label curves of the heads that learn from labels, each at the layers and settings that it has with all labels."""
    taught = [arm for arm in (arms if source.fewer else ()) if heads.get_head(arm.result.name).taught]
    candidates = [arm.learned[0].candidate for arm in taught]
    made = {share: fit_candidates(candidates, rows, tick) for share, rows in source.fewer.items()}
    found: list[LabelShare] = []
    for index, arm in enumerate(taught):
        for share, rows in source.fewer.items():
            some = build_selected_model(arm.result.name, made[share][index], rows, source.data.meta.layers)
            found.append(build_label_share(some.result, share, source.drawn))
        found.append(build_label_share(arm.result, 1.0, source.drawn))
    return found


def _moved(given: Sequence[ReportSource], arms: Sequence[Sequence[SelectedModel]]) -> list[TransferResult]:
    """Every head of every data set on the test parts of all."""
    found: list[TransferResult] = []
    for here, learned in zip(given, arms, strict=True):
        for there in given:
            places = {seed: parts.test_indices for seed, parts in there.rows.items()}
            read = {seed: _read(there.data, at, here.rows[seed]) for seed, at in places.items()}
            for arm in learned:
                tests = [compute_test_risks(made, read[made.seed], places[made.seed]) for made in arm.learned]
                found.append(build_transfer(arm.result.name, here.name, there.name, tests, there.drawn))
    order = list(dict.fromkeys(arm.result.name for learned in arms for arm in learned))
    return sorted(found, key=lambda cell: order.index(cell.name))


def _read(data: SignalDataset, at: Tensor, parts: DataSplits) -> DetectorRows:
    """Answers of a data set as detectors that learned elsewhere read them."""
    return build_foreign_rows(data.psi[at], [data.traces[i] for i in at.tolist()], data.truthful[at], parts)


def _names(folders: Sequence[str]) -> list[str]:
    """What data sets are called: their folder's name, or all of the path where two have one name."""
    short = [open_folder(folder).resolve().name for folder in folders]
    return [folder if short.count(name) > 1 else name for folder, name in zip(folders, short, strict=True)]


def _notes(config: TruthConfig, given: Sequence[ReportSource]) -> list[str]:
    notes = [f"{config.test:.0%} of the questions test, {config.validation:.0%} choose and calibrate, the others train"]
    notes += [
        f"{source.name}: no point at {share:.0%} of the labels, where a seed's training labels are all of one class"
        for source in given
        for share in config.labels
        if share not in source.fewer
    ]
    return [*notes, format_code_version()]
