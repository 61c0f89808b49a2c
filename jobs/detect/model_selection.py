"""Training of detectors over seeds, model selection on validation, and risks on the test parts.

Shared by `trimtab detect` and `trimtab evaluate truth`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice, product
from statistics import mean
from typing import Any

import ray
import torch
from ray.exceptions import RayError
from torch import Tensor

from trimtab import heads
from trimtab.detection.calibration import compute_risk, fit_platt
from trimtab.detection.signal_dataset import SignalDataset
from trimtab.detection.subject_terms import TERMS
from trimtab.detection.training import Candidate, DataSplits, TrainedDetector, select_features, split_data, train_detector
from trimtab.errors import UsageError
from trimtab.evaluation.detection.pooling import DetectorResult, SeedRisks
from trimtab.heads import DetectorRows
from trimtab.jobs.runtime.cluster import POLL_SECONDS, unwrap_ray_error
from trimtab.jobs.runtime.config import as_source_list
from trimtab.types import Subject

ALL = "all"
# This head needs samples: without them `all` skips it, and only an explicit request for it fails.
SAMPLED = "sep"
# Default options by head and subject, None being all subjects. Few groups for FLaG, because there are few rows (METHODS 2). A
# linear probe on prompts reads the mean as well: the last state alone depends on the last words (ours).
DEFAULT_OPTIONS: Mapping[tuple[str, Subject | None], Mapping[str, Any]] = {
    ("flag", None): {"groups": [4, 8, 16]},
    ("linear", "prompt"): {"parts": 2},
}
LEAST_ANSWERS = 50


@dataclass(frozen=True)
class HeadTrials:
    """Search space of a head.

    The search tries every set of layers with the middle settings, then the other settings on the best layers. Trying every
    pair would double the number of fits.

    Attributes:
        head: name of the head.
        there: layers of psi.
        layers: sets of layers to try, as indices into `there`.
        settings: settings to try.
    """

    head: str
    there: Sequence[int]
    layers: Sequence[tuple[int, ...]]
    settings: Sequence[Mapping[str, Any]]

    @property
    def middle(self) -> Mapping[str, Any]:
        """Settings under which sets of layers are compared."""
        return self.settings[len(self.settings) // 2]

    @property
    def count(self) -> int:
        """Number of fits per seed."""
        return len(self.layers) + len(self.settings) - 1


@dataclass(frozen=True)
class SelectedModel:
    """Selected head: its result and the trained detector of each seed."""

    result: DetectorResult
    learned: Sequence[TrainedDetector]


def split_by_seed(
    data: SignalDataset,
    seeds: int,
    validation: float,
    test: float,
    labels: float = 1.0,
    spread: Tensor | None = None,
    windows: Sequence[Tensor | None] = (),
    *,
    by_time: bool = False,
) -> dict[int, DataSplits]:
    """Split a data set once per seed.

    Args:
        data: data set of N answers.
        seeds: number of seeds.
        validation: share of the questions for validation.
        test: share of the questions for the test part.
        labels: share of the training labels to use.
        spread: semantic entropies [N] if there are samples.
        windows: features of the windows of each prompt; empty if windows are not read.
        by_time: test on the latest answers of live traffic, and validate on those before.

    Returns:
        Splits by seed.

    Raises:
        UsageError: if there are too few labeled answers, or all answers of a part are of one class.
    """
    labeled = int((~data.truthful.isnan()).sum())
    if labeled < LEAST_ANSWERS:
        rows = TERMS[data.meta.subject].rows
        raise UsageError(f"there are {labeled} labeled {rows}; a detector needs {LEAST_ANSWERS}. Collect more {rows}")
    splits = {
        seed: split_data(
            *(data.psi, data.traces, data.truthful, data.groups, seed, validation, test, labels, spread),
            windows=windows,
            times=data.times if by_time else None,
            repeats=data.repeats,
        )
        for seed in range(seeds)
    }
    for seed, rows in splits.items():
        for name, part in (("training", rows.train), ("validation", rows.validation), ("test", rows.test)):
            if not has_two_classes(part):
                raise UsageError(
                    f"seed {seed}: the {len(part)} {name} {TERMS[data.meta.subject].rows} are all of one class. "
                    "Collect more, or enlarge the part"
                )
    return splits


def list_trials(
    head: list[str] | str, data: SignalDataset, layers: Sequence[int], settings: Mapping[str, Any], *, sampled: bool
) -> dict[str, HeadTrials]:
    """Return the search space of each requested head.

    Args:
        head: names of heads, or `all`.
        data: data set.
        layers: layers to try; all collected layers if empty.
        settings: settings of the first head.
        sampled: whether the data set has samples to train on.

    Raises:
        UsageError: if a layer was not collected.
        NotFoundError: if a head is unknown.
    """
    names = heads.list_heads() if as_source_list(head) == [ALL] else list(dict.fromkeys(as_source_list(head)))
    collected = data.meta.layers
    if unknown := [layer for layer in layers if layer not in collected]:
        raise UsageError(f"layer {unknown[0]} was not collected. Use {', '.join(map(str, collected))}")
    indices = [collected.index(layer) for layer in (layers or collected)]
    return {
        name: HeadTrials(
            name,
            collected,
            _list_layer_sets(name, indices),
            _list_settings(name, data.meta.subject, settings if name == names[0] else {}),
        )
        for name in names
        if name != SAMPLED or sampled or name in as_source_list(head)
    }


def select_models(tried: Sequence[HeadTrials], rows: Mapping[int, DataSplits], tick: Callable[[], None]) -> list[SelectedModel]:
    """Fit the search space of each head with every seed, and select one model per head.

    The model with the best mean AUROC on validation is measured on test.

    Args:
        tried: search spaces of the heads.
        rows: splits by seed.
        tick: callback that is called after each fit.
    """
    first = fit_every_candidate([[Candidate(t.head, layers, t.middle) for layers in t.layers] for t in tried], rows, tick)
    best_layers = [_select_best(fits)[0].candidate.layers for fits in first]
    others = [
        [Candidate(t.head, layers, s) for s in t.settings if s is not t.middle]
        for t, layers in zip(tried, best_layers, strict=True)
    ]
    second = fit_every_candidate(others, rows, tick)
    return [_select_model(t, [*a, *b], rows) for t, a, b in zip(tried, first, second, strict=True)]


def fit_candidates(
    candidates: Sequence[Candidate], rows: Mapping[int, DataSplits], tick: Callable[[], None]
) -> list[list[TrainedDetector]]:
    """Fit each candidate with every seed; `tick` is called after each fit."""
    fits = iter(run_fits([FitTask(candidate, seed, parts) for candidate in candidates for seed, parts in rows.items()], tick))
    return [list(islice(fits, len(rows))) for _ in candidates]


def fit_every_candidate(
    candidates: Sequence[Sequence[Candidate]], rows: Mapping[int, DataSplits], tick: Callable[[], None]
) -> list[list[list[TrainedDetector]]]:
    """Fit several lists of candidates in one round, which keeps a large cluster busy.

    Returns:
        For each list and each of its candidates, the trained detectors of all seeds.
    """
    fits = iter(fit_candidates([candidate for group in candidates for candidate in group], rows, tick))
    return [list(islice(fits, len(group))) for group in candidates]


def build_selected_model(
    name: str, trained: Sequence[TrainedDetector], rows: Mapping[int, DataSplits], layers: Sequence[int]
) -> SelectedModel:
    """Measure the trained detectors of a candidate on their test parts.

    Args:
        name: name of the result.
        trained: trained detector of each seed.
        rows: splits by seed.
        layers: layers of psi.
    """
    tests = [compute_risks(detector, rows[detector.seed].test, rows[detector.seed].test_indices) for detector in trained]
    candidate = trained[0].candidate
    chosen = {"layers": [layers[index] for index in candidate.layers], **candidate.settings}
    result = DetectorResult(name, chosen, tests, compute_validation_auroc(trained), 0.0)
    return SelectedModel(_set_oracle_to_auroc(result), trained)


def compute_risks(trained: TrainedDetector, part: DetectorRows, indices: Tensor) -> SeedRisks:
    """Compute the risks of the answers [N] of a part; `indices` [N] are their rows in the data set."""
    features = select_features(part, trained.candidate)
    return calibrate_score(heads.predict_scores(trained.head, features), trained.calibration, part, indices, trained.seed)


def build_score_result(name: str, score: Tensor, tokens: float, rows: Mapping[int, DataSplits]) -> DetectorResult:
    """Measure a training-free score, calibrated on validation as heads are.

    Args:
        name: name of the score.
        score: scores [N] of the data set's answers; higher is more truthful.
        tokens: generated tokens per answer beyond the answer itself.
        rows: splits by seed.
    """
    tests: list[SeedRisks] = []
    validations: list[SeedRisks] = []
    aurocs: list[float] = []
    for seed, split in rows.items():
        validation_score, truthful = score[split.validation_indices], split.validation.truthful
        platt = fit_platt(validation_score, truthful)
        tests.append(calibrate_score(score[split.test_indices], platt, split.test, split.test_indices, seed))
        validations.append(calibrate_score(validation_score, platt, split.validation, split.validation_indices, seed))
        aurocs.append(heads.compute_auroc(validation_score, truthful))
    result = DetectorResult(name, {}, tests, mean(aurocs), 0.0, learned=False, tokens=tokens, validations=validations)
    return _set_oracle_to_auroc(result)


def calibrate_score(score: Tensor, platt: Tensor, part: DetectorRows, indices: Tensor, seed: int) -> SeedRisks:
    """Convert scores [N] of the answers of a part to risks, before and after calibration.

    Args:
        score: scores [N]; higher is more truthful.
        platt: slope and offset [2] of the calibration.
        part: test or validation answers.
        indices: rows [N] of the answers in the data set.
        seed: seed of the split.
    """
    risk, raw = compute_risk(score, platt), torch.sigmoid(-score)
    return SeedRisks(seed, indices.numpy(), risk.double().numpy(), raw.double().numpy(), (part.truthful == 0).numpy())


def has_two_classes(rows: DetectorRows) -> bool:
    """Return whether the labeled answers include both right and made-up ones."""
    return len(rows.labelled.truthful.unique()) == 2


def compute_validation_auroc(trained: Sequence[TrainedDetector]) -> float:
    """Compute the mean AUROC on validation over seeds."""
    return mean(detector.validation for detector in trained)


def _list_layer_sets(name: str, indices: Sequence[int]) -> list[tuple[int, ...]]:
    """Return each layer alone and, for heads that use several layers, all layers together."""
    joint = heads.get_head(name).joint and len(indices) > 1
    return [(index,) for index in indices] + ([tuple(indices)] if joint else [])


def _list_settings(name: str, subject: Subject, options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return every combination of settings; a list is a set of choices."""
    choices = {**DEFAULT_OPTIONS.get((name, None), {}), **DEFAULT_OPTIONS.get((name, subject), {}), **options}
    lists = [value if isinstance(value, list) else [value] for value in choices.values()]
    return [dict(zip(choices, values, strict=True)) for values in product(*lists)]


def _select_model(tried: HeadTrials, fits: Sequence[list[TrainedDetector]], rows: Mapping[int, DataSplits]) -> SelectedModel:
    best = build_selected_model(tried.head, _select_best(fits), rows, tried.there)
    oracle = max(build_selected_model(tried.head, trained, rows, tried.there).result.auroc for trained in fits)
    splits = [(detector, rows[detector.seed]) for detector in best.learned]
    validations = [compute_risks(detector, split.validation, split.validation_indices) for detector, split in splits]
    return replace(best, result=replace(best.result, oracle=oracle, validations=validations))


def _select_best(fits: Sequence[list[TrainedDetector]]) -> list[TrainedDetector]:
    return max(fits, key=compute_validation_auroc)


def _set_oracle_to_auroc(result: DetectorResult) -> DetectorResult:
    """Set the oracle AUROC of a result without alternatives, for which selection on test changes nothing."""
    return replace(result, oracle=result.auroc)


@dataclass(frozen=True)
class FitTask:
    """Fit of a candidate with one seed, on the rows of that seed."""

    candidate: Candidate
    seed: int
    rows: DataSplits


def run_fits(fits: Sequence[FitTask], tick: Callable[[], None]) -> list[TrainedDetector]:
    """Run fits on the connected Ray cluster.

    Args:
        fits: fits to run.
        tick: callback that is called after each fit.

    Returns:
        Trained detectors, in the order of `fits`.

    Raises:
        TrimtabError: the error of the first fit that failed. The other fits are canceled.
    """
    rows = {id(fit.rows): fit.rows for fit in fits}
    stored = {key: ray.put(parts) for key, parts in rows.items()}
    task = ray.remote(num_cpus=1)(train_detector)
    references = [task.remote(fit.candidate, stored[id(fit.rows)], fit.seed) for fit in fits]
    waiting = references
    try:
        while waiting:
            ended, waiting = ray.wait(waiting, timeout=POLL_SECONDS)
            for reference in ended:
                ray.get(reference)
                tick()
        return ray.get(references)
    except RayError as error:
        raise unwrap_ray_error(error) from error
    finally:
        for reference in waiting:
            ray.cancel(reference, force=True)
