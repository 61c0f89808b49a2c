"""Job of `trimtab evaluate truth`: report on detectors, for data sets that `trimtab collect` wrote.

trimtab evaluate truth --signals countries trivia
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from trimtab import heads, settings
from trimtab.cli.console import ProgressBar, console, print_line
from trimtab.detection.signal_dataset import SignalDataset, read_dataset
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
from trimtab.jobs.detect.job import build_table
from trimtab.jobs.detect.model_selection import (
    HeadTrials,
    SelectedModel,
    build_selected_model,
    compute_risks,
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

# Settings that remove one part of FLaG each (METHODS 2).
ABLATIONS: dict[str, dict[str, Any]] = {
    "no geometry": {"geometry": False},
    "no trace": {"trace": False},
    "one group": {"groups": 1},
    "weighted mean": {"aggregate": "mean"},
}


@dataclass(frozen=True)
class ReportSource:
    """Data set of a report, with its splits.

    Attributes:
        name: name of the data set in the report.
        data: data set.
        rows: splits by seed.
        fewer: splits with fewer training labels, by share of the labels and by seed.
        tried: search spaces of the heads.
        free: results of the training-free scores.
        drawn: resamples of the confidence intervals.
    """

    name: str
    data: SignalDataset
    rows: Mapping[int, DataSplits]
    fewer: Mapping[float, Mapping[int, DataSplits]]
    tried: Mapping[str, HeadTrials]
    free: Sequence[DetectorResult]
    drawn: Resamples

    def fits(self, ablations: bool) -> int:
        """Return the number of fits that the report needs."""
        supervised = [name for name in self.tried if heads.get_head(name).taught]
        ablated = len(ABLATIONS) if ablations and OURS in self.tried else 0
        searched = sum(trials.count for trials in self.tried.values())
        return len(self.rows) * (searched + ablated + len(self.fewer) * len(supervised))


def evaluate_detectors(config: TruthConfig) -> DetectionReport:
    """Train and measure detectors, write the report, and log it.

    Raises:
        TrimtabError: if a data set is unsuitable, before any training, or if the job fails.
    """
    base = resolve_base_model(config.base, config.revision)
    sources = open_sources(config, base)
    folder = Path(config.out) if config.out else settings.get_runs_folder() / f"truth-{config.name}"
    run = runs.start_run(f"evaluate truth {config.name}", "truth", settings.get_home() / "outbox")
    with runs.close_run(run), ray_session(config.address):
        run.log_params({"truth": asdict(config)} | {"base_fingerprint": base.fingerprint})
        run.log_inputs([{"name": s.name, "digest": s.data.digest, "rows": len(s.data.keys)} for s in sources], "evaluation")
        report = build_report(config, base, sources)
        written = write_report(report, folder)
        run.log_metrics(get_logged_metrics(report), 0)
        for path in written:
            run.log_artifacts(path, "report")
    print_line(f"report: {written[-1]}")
    return report


def run_evaluate_truth(config: TruthConfig) -> dict[str, Any]:
    """Write the report and print its tables.

    Returns:
        Report as JSON, for `--json`.
    """
    report = evaluate_detectors(config)
    for entry in report.sets:
        results, figures = [line.result for line in entry.lines], [line.figures for line in entry.lines]
        console.print(
            build_table(results, figures, f"made-up answers in {entry.name}: test part, mean of {report.seeds} seeds")
        )
        print_line(format_comparison(entry.compared))
    return report_as_json(report)


def open_sources(config: TruthConfig, base: BaseModel) -> list[ReportSource]:
    """Read and split the data sets.

    Raises:
        UsageError: if a data set cannot be split, or its layers differ from those of the first one; names the data set.
        ArtifactError: if a data set cannot be read or is of another base model.
    """
    folders = list(dict.fromkeys(as_source_list(config.signals)))
    data_sets = {
        name: read_dataset(open_folder(path), base) for name, path in zip(_name_folders(folders), folders, strict=True)
    }
    if prompts := [name for name, data in data_sets.items() if data.meta.subject != "answer"]:
        raise UsageError(f"{prompts[0]} holds prompts, the report is on answers. Use trimtab detect --test_signals for prompts")
    first = next(iter(data_sets.values()))
    if different := [name for name, data in data_sets.items() if data.meta.layers != first.meta.layers]:
        raise UsageError(
            f"{different[0]} has layers {list(data_sets[different[0]].meta.layers)}, the first data set "
            f"{list(first.meta.layers)}. Collect them with the same --layers, or write separate reports"
        )
    return [_build_source(config, name, data) for name, data in data_sets.items()]


def build_report(config: TruthConfig, base: BaseModel, sources: Sequence[ReportSource]) -> DetectionReport:
    """Train and measure all detectors of the report, with one progress bar over all fits."""
    total = sum(source.fits(config.ablations) for source in sources)
    with ProgressBar("heads", total) as bar:
        reports = [_report_data_set(source, config.ablations, lambda: bar.update(bar.done + 1)) for source in sources]
    return DetectionReport(
        title=f"{config.name}: detectors for {base.name}",
        base=f"{base.name} {base.fingerprint}",
        layers=sources[0].data.meta.layers,
        seeds=config.num_seeds,
        sets=[entry for entry, _ in reports],
        moved=_measure_transfer(sources, [arms for _, arms in reports]) if len(sources) > 1 else [],
        notes=_build_notes(config, sources),
    )


def _build_source(config: TruthConfig, name: str, data: SignalDataset) -> ReportSource:
    try:
        answers = build_score_inputs(data)
        entropies = compute_semantic_entropies(answers, config.similarity)
        rows = split_by_seed(data, config.num_seeds, config.validation_fraction, config.test_fraction, spread=entropies)
        trials = list_trials(config.head, data, config.layers, {}, sampled=len(entropies.unique()) > 1)
        scored = measure_training_free(answers, rows, config.similarity)
    except UsageError as error:
        raise UsageError(f"{name}: {error}") from error
    reduced = {
        share: {seed: drop_labels(parts, data.groups, seed, share) for seed, parts in rows.items()}
        for share in sorted(set(config.label_fractions))
    }
    # With few labels a seed may be left with one class; such a share is omitted from the label curve.
    fewer = {share: parts for share, parts in reduced.items() if all(has_two_classes(p.train) for p in parts.values())}
    return ReportSource(name, data, rows, fewer, trials, scored, draw_resamples(data.groups, config.num_seeds))


def _report_data_set(
    source: ReportSource, ablations: bool, tick: Callable[[], None]
) -> tuple[DataSetReport, list[SelectedModel]]:
    """Return the report on a data set, and its selected models."""
    arms = select_models(list(source.tried.values()), source.rows, tick)
    results = [arm.result for arm in arms] + list(source.free)
    ablated = [r for arm in arms if arm.result.name == OURS and ablations for r in _measure_ablations(arm, source, tick)]
    best_head, best_rival = get_best_head(results), get_best_rival(results)
    truthful = source.data.truthful
    entry = DataSetReport(
        name=source.name,
        digest=source.data.digest,
        answers=len(truthful),
        labelled=int((~truthful.isnan()).sum()),
        right=int((truthful == 1).sum()),
        lines=[build_line(result, source.data.sources, source.drawn) for result in results],
        compared=estimate_difference(best_head, best_rival, source.drawn),
        ablations=[
            (build_line(r, source.data.sources, source.drawn), estimate_difference(best_head, r, source.drawn)) for r in ablated
        ],
        shares=_measure_label_shares(source, arms, tick),
    )
    return entry, arms


def _measure_ablations(arm: SelectedModel, source: ReportSource, tick: Callable[[], None]) -> list[DetectorResult]:
    """Measure FLaG without each of its parts, at the layers and settings selected for the full head."""
    candidate = arm.learned[0].candidate
    candidates = [replace(candidate, settings={**candidate.settings, **changes}) for changes in ABLATIONS.values()]
    fits = fit_candidates(candidates, source.rows, tick)
    layers = source.data.meta.layers
    return [
        build_selected_model(name, trained, source.rows, layers).result for name, trained in zip(ABLATIONS, fits, strict=True)
    ]


def _measure_label_shares(source: ReportSource, arms: Sequence[SelectedModel], tick: Callable[[], None]) -> list[LabelShare]:
    """Measure the label curves of supervised heads, each at the layers and settings selected with all labels."""
    supervised = [arm for arm in (arms if source.fewer else ()) if heads.get_head(arm.result.name).taught]
    candidates = [arm.learned[0].candidate for arm in supervised]
    fits = {share: fit_candidates(candidates, rows, tick) for share, rows in source.fewer.items()}
    curve: list[LabelShare] = []
    for index, arm in enumerate(supervised):
        for share, rows in source.fewer.items():
            model = build_selected_model(arm.result.name, fits[share][index], rows, source.data.meta.layers)
            curve.append(build_label_share(model.result, share, source.drawn))
        curve.append(build_label_share(arm.result, 1.0, source.drawn))
    return curve


def _measure_transfer(sources: Sequence[ReportSource], arms: Sequence[Sequence[SelectedModel]]) -> list[TransferResult]:
    """Measure the selected models of every data set on the test parts of all data sets."""
    cells: list[TransferResult] = []
    for source, models in zip(sources, arms, strict=True):
        for target in sources:
            indices = {seed: parts.test_indices for seed, parts in target.rows.items()}
            tests = {seed: _read_foreign_rows(target.data, rows, source.rows[seed]) for seed, rows in indices.items()}
            for arm in models:
                risks = [compute_risks(trained, tests[trained.seed], indices[trained.seed]) for trained in arm.learned]
                cells.append(build_transfer(arm.result.name, source.name, target.name, risks, target.drawn))
    order = list(dict.fromkeys(arm.result.name for models in arms for arm in models))
    return sorted(cells, key=lambda cell: order.index(cell.name))


def _read_foreign_rows(data: SignalDataset, indices: Tensor, parts: DataSplits) -> DetectorRows:
    """Build the rows of answers for detectors that were trained on another data set, whose splits are `parts`."""
    return build_foreign_rows(data.psi[indices], [data.traces[i] for i in indices.tolist()], data.truthful[indices], parts)


def _name_folders(folders: Sequence[str]) -> list[str]:
    """Return the name of each folder, or its full path if two folders have the same name."""
    short = [open_folder(folder).resolve().name for folder in folders]
    return [folder if short.count(name) > 1 else name for folder, name in zip(folders, short, strict=True)]


def _build_notes(config: TruthConfig, sources: Sequence[ReportSource]) -> list[str]:
    shares = f"{config.test_fraction:.0%} test, {config.validation_fraction:.0%} model selection and calibration"
    notes = [f"questions: {shares}, the others training"]
    notes += [
        f"{source.name}: no point at {share:.0%} of the labels, because a seed's training labels are all of one class"
        for source in sources
        for share in config.label_fractions
        if share not in source.fewer
    ]
    return [*notes, format_code_version()]
