"""Job of `trimtab detect`: detectors trained on collected signals, selected on validation, measured on test.

trimtab detect --signals signals --head flag --out detector
trimtab detect --signals guard-signals --head linear --name guard
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.table import Table

from trimtab import settings
from trimtab.cli.console import ProgressBar, console, print_line
from trimtab.detection.detector import Detector, build_detector, save_detector
from trimtab.detection.detector_card import DetectorCard
from trimtab.detection.live_labels import EVIDENCE
from trimtab.detection.merged_dataset import count_trusted_labels
from trimtab.detection.signal_dataset import SignalDataset
from trimtab.detection.subject_terms import TERMS
from trimtab.detection.training import DataSplits, TrainedDetector
from trimtab.errors import UsageError
from trimtab.evaluation.detection.pooling import DetectorResult, PooledMetrics, draw_resamples, measure_result, result_as_json
from trimtab.evaluation.rendering import plain
from trimtab.jobs.detect.config import DetectConfig
from trimtab.jobs.detect.final_fit import FITS, FinalFit, fit_final_detector
from trimtab.jobs.detect.further_sets import (
    FurtherSetResult,
    build_further_table,
    measure_by_source,
    measure_further_set,
    read_further_sets,
)
from trimtab.jobs.detect.gate import check_gate
from trimtab.jobs.detect.label_fits import LabelFit, check_labels, fit_labels
from trimtab.jobs.detect.model_selection import list_trials, select_models, split_by_seed
from trimtab.jobs.detect.reserved_labels import add_reference_risks, calibrate_on_reserved, select_evidence
from trimtab.jobs.detect.stopping import StopResult, build_stop_table, compute_stop_thresholds, measure_stops
from trimtab.jobs.detect.training_data import TrainingData, read_training_data
from trimtab.jobs.detect.training_free import build_score_inputs, compute_semantic_entropies, measure_training_free
from trimtab.jobs.runtime.cluster import ray_session
from trimtab.jobs.runtime.config import as_source_list
from trimtab.model.base_model import BaseModel, resolve_base_model
from trimtab.tracking import registry, runs
from trimtab.tracking.promotions import register_and_promote
from trimtab.tracking.registry import Version
from trimtab.tracking.runs import TrackedRun
from trimtab.types import Subject
from trimtab.util.identifiers import compute_key


@dataclass(frozen=True)
class DetectResult:
    """Result of `trimtab detect`.

    Attributes:
        subject: subject of the detectors.
        folder: folder of the saved detector, which has the first head.
        results: results of all heads and scores.
        figures: pooled metrics of each result.
        version: registered version; None if it was not registered.
        gate: reason of the gate's decision; None if it was not registered.
        others: results on further data sets.
        out_of_fold: results of out-of-fold risks on the training data, by source; empty for answers.
        stops: effect of a policy that stops answers; empty without signals of unfinished answers.
    """

    subject: Subject
    folder: Path
    results: list[DetectorResult]
    figures: list[PooledMetrics]
    version: Version | None
    gate: str | None
    others: Sequence[FurtherSetResult] = ()
    out_of_fold: Sequence[FurtherSetResult] = ()
    stops: Sequence[StopResult] = ()

    def as_json(self) -> dict[str, Any]:
        """Return the output of `--json`: metrics of the first head and its rivals.

        `test` has the AUROC with its interval [low, high].
        """
        head, *rivals = [_flatten_metrics(result_as_json(r, f)) for r, f in zip(self.results, self.figures, strict=True)]
        version = asdict(self.version) if self.version else None
        output = head | {"rivals": rivals, "detector": str(self.folder), "version": version, "gate": self.gate}
        output |= {"test_signals": [asdict(result) for result in self.others]}
        output |= {"out_of_fold": [asdict(result) for result in self.out_of_fold]}
        output |= {"stops": [asdict(result) for result in self.stops]}
        return plain(output)


def train_detectors(config: DetectConfig) -> DetectResult:
    """Train, measure, save, log and register detectors.

    Raises:
        TrimtabError: if the data set is unsuitable, before any training, or if the job fails.
    """
    registry.format_model_name("base", config.name)
    base = resolve_base_model(config.base, config.revision)
    registry.format_model_name(base.name, config.name)
    read = read_training_data(config, base)
    data = read.data
    others = read_further_sets(as_source_list(config.test_signals), base, data)
    # Prompts have no answer to score.
    answers = build_score_inputs(data) if data.meta.subject == "answer" else []
    if config.windows and data.meta.subject == "answer":
        raise UsageError("windows are those of prompts, and these signals are of answers. Omit --windows")
    windows = data.build_windows() if config.windows else ()
    labels = check_labels(data)
    entropies = compute_semantic_entropies(answers, config.similarity)
    trials = list_trials(config.head, data, config.layers, config.head_options, sampled=len(entropies.unique()) > 1)
    splits = split_by_seed(
        data,
        config.num_seeds,
        config.validation_fraction,
        config.test_fraction,
        config.label_fraction,
        entropies,
        windows,
        by_time=config.split == "time",
    )
    scored = measure_training_free(answers, splits, config.similarity)
    run = runs.start_run(config.name, "detect", settings.get_home() / "outbox")
    with runs.close_run(run), ray_session(config.address):
        run.log_params({"config": asdict(config), "base_fingerprint": base.fingerprint})
        run.log_inputs(read.sources, "training")
        # Live labels are few: no row is left out of the detector that is saved.
        is_refit = data.meta.subject == "prompt" or read.has_live_rows
        further_fits = FITS * max(1, len(labels)) if is_refit else 0
        with ProgressBar("heads", config.num_seeds * sum(head.count for head in trials.values()) + further_fits) as bar:
            arms = select_models(list(trials.values()), splits, lambda: bar.update(bar.done + 1))
            best = max(arms[0].learned, key=lambda trained: trained.validation)
            seed, rows = best.seed, splits[best.seed]
            own: list[FurtherSetResult] = []
            by_label: LabelFit | None = None
            if further_fits:
                selected, shares = best, (config.validation_fraction, config.label_fraction)

                def fit(part: SignalDataset) -> FinalFit:
                    return fit_final_detector(selected, part, *shares, lambda: bar.update(bar.done + 1), windows, entropies)

                by_label = fit_labels(data, labels, fit) if labels else None
                final = by_label.combined if by_label else fit(data)
                best, rows = final.trained, final.splits
                _log_out_of_fold(data, final, run)
                own = measure_by_source(data, final.rows, final.risk, best.thresholds)
                own += by_label.results if by_label else []
        results = [arm.result for arm in arms] + scored
        resamples = draw_resamples(data.groups, config.num_seeds)
        figures = [measure_result(result.tests, resamples) for result in results]
        detector = _build_detector(config, base, read, arms[0].result, best, rows, run, by_label)
        if read.reserved is not None:
            detector = calibrate_on_reserved(detector, read.reserved)
            detector = add_reference_risks(detector, read.reserved, torch.arange(len(read.reserved.keys)))
            _log_evidence(read, read.reserved, run)
        elif data.meta.subject == "answer":
            detector = add_reference_risks(detector, data, torch.cat([rows.validation_indices, rows.test_indices]))
        stops: list[StopResult] = []
        if data.unfinished:
            thresholds = compute_stop_thresholds(detector, data, rows.validation_indices)
            detector = replace(detector, card=replace(detector.card, stop_thresholds=thresholds))
            stops = measure_stops(detector, data, rows.test_indices)
        folder = save_detector(
            detector, Path(config.out) if config.out else settings.get_runs_folder() / f"detect-{config.name}"
        )
        measured = [measure_further_set(detector, name, other, data) for name, other in others.items()]
        detected = DetectResult(data.meta.subject, folder, results, figures, None, None, measured, own, stops)
        _log_result(detected, run)
        _log_risks(arms[0].result, seed, data, folder, run)
        if config.register:
            decision = check_gate(config, base, data, results, seed, detector, read.reserved)
            version = register_and_promote(folder, run, decision.passed, decision.reason, promote=config.promote)
            detected = replace(detected, version=version, gate=decision.reason)
    return detected


def run_detect(config: DetectConfig) -> dict[str, Any]:
    """Train detectors and print their metrics.

    Returns:
        Output of `--json`.
    """
    detected = train_detectors(config)
    terms = TERMS[detected.subject]
    title = f"{terms.positives} in {' and '.join(as_source_list(config.signals))}: test part, mean of {config.num_seeds} seeds"
    console.print(build_table(detected.results, detected.figures, title))
    for title, measured in (("out of fold", detected.out_of_fold), ("other data sets", detected.others)):
        if measured:
            console.print(build_further_table(title, measured, terms.positives, terms.negatives))
    if detected.stops:
        console.print(build_stop_table(detected.stops))
    if detected.version:
        print_line(f"registered {config.name} version {detected.version.version} as candidate; gate: {detected.gate}")
    print_line(f"detector: {detected.folder}")
    return detected.as_json()


def build_table(results: Sequence[DetectorResult], figures: Sequence[PooledMetrics], title: str) -> Table:
    """Build a table with one line per head and score."""
    table = Table(title=title, title_justify="left")
    for column in ("", "AUROC", "AUPRC", "FPR at 95 % caught", "ECE", "raw ECE", "chosen on test", "tokens"):
        table.add_column(column, no_wrap=True)
    for r, f in zip(results, figures, strict=True):
        numbers = (f.auprc.value, f.fpr95.value, f.ece, f.ece_raw, r.oracle)
        table.add_row(r.name, str(f.auroc), *(f"{number:.3f}" for number in numbers), f"{r.tokens:.1f}")
    return table


def _flatten_metrics(entry: dict[str, Any]) -> dict[str, Any]:
    """Replace intervals by their values, and add the interval of the AUROC."""
    test = entry["test"]
    numbers = {name: figure["value"] if isinstance(figure, dict) else figure for name, figure in test.items()}
    return entry | {"test": numbers | {"interval": [test["auroc"]["low"], test["auroc"]["high"]]}}


def _build_detector(
    config: DetectConfig,
    base: BaseModel,
    read: TrainingData,
    result: DetectorResult,
    best: TrainedDetector,
    rows: DataSplits,
    run: TrackedRun,
    by_label: LabelFit | None,
) -> Detector:
    """Build the artifact of the seed with the best validation AUROC."""
    data = read.data
    card = DetectorCard(
        name=config.name,
        base=base.name,
        fingerprint=base.fingerprint,
        layers=[data.meta.layers[index] for index in best.candidate.layers],
        width=base.width,
        head=best.candidate.head,
        head_options=dict(best.candidate.settings),
        low_log_probability=rows.low,
        thresholds=best.thresholds,
        prefix_digest=data.meta.prefix_digest,
        method={
            "seed": best.seed,
            "seeds": config.num_seeds,
            "validation": config.validation_fraction,
            "test": config.test_fraction,
        },
        data=read.sources,
        metrics={"test_auroc": result.auroc, "validation_auroc": best.validation},
        run_id=run.run_id,
        subject=data.meta.subject,
        windows=config.windows,
        label_thresholds=dict(by_label.thresholds) if by_label else {},
    )
    return build_detector(by_label.head if by_label else best.head, rows.normalizer, best.calibration, card)


def _log_result(detected: DetectResult, run: TrackedRun) -> None:
    path = detected.folder / "report.json"
    path.write_text(json.dumps(detected.as_json(), indent=1) + "\n")
    run.log_artifacts(path, "evaluation")
    run.log_metrics({f"test/{r.name}/auroc": f.auroc.value for r, f in zip(detected.results, detected.figures, strict=True)}, 0)


def _log_out_of_fold(data: SignalDataset, final: FinalFit, run: TrackedRun) -> None:
    """Log the out-of-fold risk of each prompt by key, without texts, for the training of conditional prefixes."""
    risks = {data.keys[row]: round(float(risk), 6) for row, risk in zip(final.rows.tolist(), final.risk, strict=True)}
    _log_json(run, "out_of_fold.json", risks)


def _log_evidence(read: TrainingData, reserved: SignalDataset, run: TrackedRun) -> None:
    """Log the keys of the reserved answers whose labels calibrate the detector and decide the gate, and the last time."""
    times = torch.cat([read.data.times[read.data.is_live], reserved.times])
    labels = count_trusted_labels(read.data) + count_trusted_labels(reserved)
    keys = [reserved.keys[row] for row in select_evidence(reserved).tolist()]
    _log_json(run, Path(EVIDENCE).name, {"keys": keys, "labels": labels, "until": times.max().item()})


def _log_json(run: TrackedRun, name: str, value: dict[str, Any]) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_text(json.dumps(value))
        run.log_artifacts(path, "evaluation")


def _log_risks(result: DetectorResult, seed: int, data: SignalDataset, folder: Path, run: TrackedRun) -> None:
    """Log the risks of the validation and test answers by key, without texts, so that gates can compare later versions."""
    parts = {"validation": result.validations, "test": result.tests}
    risks = {part: next(risks for risks in seeds if risks.seed == seed) for part, seeds in parts.items()}
    recorded = {
        part: {
            data.keys[row]: {
                "risk": round(float(risk), 6),
                "made_up": bool(made_up),
                "group": compute_key(data.groups[row].encode(), 12),
            }
            for row, risk, made_up in zip(r.at, r.risk, r.made_up, strict=True)
        }
        for part, r in risks.items()
    }
    path = folder / "risks.json"
    path.write_text(json.dumps(recorded))
    run.log_artifacts(path, "evaluation")
