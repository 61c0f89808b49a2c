"""Ways to tell made-up answers, learned over seeds: what is tried, chosen on validation, and what it says of the test parts.

Both `trimtab detect` and `trimtab evaluate truth` stand on this.
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
from trimtab.detection.training import Candidate, DataSplits, TrainedDetector, select_features, split_data, train_detector
from trimtab.errors import UsageError
from trimtab.evaluation.detection.pooling import DetectorResult, SeedRisks
from trimtab.heads import DetectorRows
from trimtab.jobs.collect.signal_dataset import SignalDataset
from trimtab.jobs.runtime.cluster import POLL_SECONDS, unwrap_ray_error
from trimtab.jobs.runtime.config import as_source_list

ALL = "all"
# Learns from samples: without them only who asks for it by name is told so.
SAMPLED = "sep"
# Groups of FLaG that are tried where nothing is said: few, as there are few rows (METHODS 2).
GROUPS = [4, 8, 16]
LEAST_ANSWERS = 50


@dataclass(frozen=True)
class HeadTrials:
    """What is tried for a head: sets of layers with the middle one of the settings, then the other settings on the layers that
    were best; every pair would be twice as many. `layers` are indices into psi, whose layers are `there`."""

    head: str
    there: Sequence[int]
    layers: Sequence[tuple[int, ...]]
    settings: Sequence[Mapping[str, Any]]

    @property
    def middle(self) -> Mapping[str, Any]:
        """The settings that layers are compared with."""
        return self.settings[len(self.settings) // 2]

    @property
    def count(self) -> int:
        """Fits of each seed."""
        return len(self.layers) + len(self.settings) - 1


@dataclass(frozen=True)
class SelectedModel:
    """A head with the figures that are shown of it, and what was learned with each seed."""

    result: DetectorResult
    learned: Sequence[TrainedDetector]


def split_by_seed(
    data: SignalDataset, seeds: int, validation: float, test: float, labels: float = 1.0, spread: Tensor | None = None
) -> dict[int, DataSplits]:
    """The parts of each seed; `spread` [N] are semantic entropies, where there are samples. Raises UsageError where there are
    too few answers, or all answers of a part are of one class."""
    known = int((~data.truthful.isnan()).sum())
    if known < LEAST_ANSWERS:
        raise UsageError(f"there are {known} labelled answers; a detector needs {LEAST_ANSWERS}: collect more")
    made = {
        seed: split_data(data.psi, data.traces, data.truthful, data.groups, seed, validation, test, labels, spread)
        for seed in range(seeds)
    }
    for seed, rows in made.items():
        for name, part in (("training", rows.train), ("validation", rows.validation), ("test", rows.test)):
            if not has_two_classes(part):
                raise UsageError(
                    f"seed {seed}: the {len(part)} {name} answers are all of one class; collect more, or give the part more"
                )
    return made


def list_trials(
    head: list[str] | str, data: SignalDataset, layers: Sequence[int], settings: Mapping[str, Any], *, sampled: bool
) -> dict[str, HeadTrials]:
    """What is tried for each head that is asked for; `settings` are those of the first one; `sampled` is whether there are
    samples to learn from. Raises UsageError for a layer that was not collected, NotFoundError for a head that there is not."""
    names = heads.list_heads() if as_source_list(head) == [ALL] else list(dict.fromkeys(as_source_list(head)))
    there = data.meta.layers
    if unknown := [layer for layer in layers if layer not in there]:
        raise UsageError(f"layer {unknown[0]} was not collected; there are {', '.join(map(str, there))}")
    indices = [there.index(layer) for layer in (layers or there)]
    return {
        name: HeadTrials(name, there, _sets(name, indices), _choices(name, settings if name == names[0] else {}))
        for name in names
        if name != SAMPLED or sampled or name in as_source_list(head)
    }


def select_models(tried: Sequence[HeadTrials], rows: Mapping[int, DataSplits], tick: Callable[[], None]) -> list[SelectedModel]:
    """Fit all that is tried for each head with every seed; of each head, what has the best mean AUROC on validation is measured
    on test. `tick` is called after each fit."""
    first = fit_every_candidate([[Candidate(t.head, layers, t.middle) for layers in t.layers] for t in tried], rows, tick)
    found = [_best(every)[0].candidate.layers for every in first]
    others = [
        [Candidate(t.head, layers, s) for s in t.settings if s is not t.middle] for t, layers in zip(tried, found, strict=True)
    ]
    second = fit_every_candidate(others, rows, tick)
    return [_chosen(t, [*a, *b], rows) for t, a, b in zip(tried, first, second, strict=True)]


def fit_candidates(
    candidates: Sequence[Candidate], rows: Mapping[int, DataSplits], tick: Callable[[], None]
) -> list[list[TrainedDetector]]:
    """Each candidate with every seed."""
    made = iter(run_fits([FitTask(candidate, seed, parts) for candidate in candidates for seed, parts in rows.items()], tick))
    return [list(islice(made, len(rows))) for _ in candidates]


def fit_every_candidate(
    candidates: Sequence[Sequence[Candidate]], rows: Mapping[int, DataSplits], tick: Callable[[], None]
) -> list[list[list[TrainedDetector]]]:
    """Several lists of candidates, all at once, so that a large cluster is used."""
    made = iter(fit_candidates([one for some in candidates for one in some], rows, tick))
    return [list(islice(made, len(some))) for some in candidates]


def build_selected_model(
    name: str, made: Sequence[TrainedDetector], rows: Mapping[int, DataSplits], there: Sequence[int]
) -> SelectedModel:
    """What was learned with each seed, and what it says of its test part; psi has the layers `there`."""
    tests = [compute_test_risks(one, rows[one.seed].test, rows[one.seed].test_indices) for one in made]
    candidate = made[0].candidate
    chosen = {"layers": [there[index] for index in candidate.layers], **candidate.settings}
    return SelectedModel(_without_choice(DetectorResult(name, chosen, tests, compute_validation_auroc(made), 0.0)), made)


def compute_test_risks(made: TrainedDetector, test: DetectorRows, at: Tensor) -> SeedRisks:
    """What a detector says of answers [N] that stand `at` [N] in their data set."""
    seen = select_features(test, made.candidate)
    return calibrate_score(heads.predict_scores(made.head, seen), made.calibration, test, at, made.seed)


def build_score_result(name: str, score: Tensor, tokens: float, rows: Mapping[int, DataSplits]) -> DetectorResult:
    """A training-free score [N] of a data set's answers, calibrated on validation as heads are; higher is more truthful. It
    costs so many `tokens` an answer."""
    known = {seed: score[parts.validation_indices] for seed, parts in rows.items()}
    tests = [
        calibrate_score(
            score[parts.test_indices],
            fit_platt(known[seed], parts.validation.truthful),
            parts.test,
            parts.test_indices,
            seed,
        )
        for seed, parts in rows.items()
    ]
    validation = mean(heads.compute_auroc(known[seed], parts.validation.truthful) for seed, parts in rows.items())
    return _without_choice(DetectorResult(name, {}, tests, validation, 0.0, learned=False, tokens=tokens))


def calibrate_score(score: Tensor, platt: Tensor, test: DetectorRows, at: Tensor, seed: int) -> SeedRisks:
    """Scores [N] of test answers as risks, before and after calibration."""
    risk, raw = compute_risk(score, platt), torch.sigmoid(-score)
    return SeedRisks(seed, at.numpy(), risk.double().numpy(), raw.double().numpy(), (test.truthful == 0).numpy())


def has_two_classes(rows: DetectorRows) -> bool:
    """Whether there are right and made-up answers among the labelled ones."""
    return len(rows.labelled.truthful.unique()) == 2


def compute_validation_auroc(made: Sequence[TrainedDetector]) -> float:
    """Mean AUROC on validation."""
    return mean(one.validation for one in made)


def _sets(name: str, indices: Sequence[int]) -> list[tuple[int, ...]]:
    """Each layer alone and, for heads that look at several, all together."""
    joint = heads.get_head(name).joint and len(indices) > 1
    return [(index,) for index in indices] + ([tuple(indices)] if joint else [])


def _choices(name: str, given: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each choice of settings; one that is a list is a choice by itself."""
    choices = ({"groups": GROUPS} if name == "flag" else {}) | dict(given)
    lists = [value if isinstance(value, list) else [value] for value in choices.values()]
    return [dict(zip(choices, values, strict=True)) for values in product(*lists)]


def _chosen(tried: HeadTrials, every: Sequence[list[TrainedDetector]], rows: Mapping[int, DataSplits]) -> SelectedModel:
    best = build_selected_model(tried.head, _best(every), rows, tried.there)
    oracle = max(build_selected_model(tried.head, each, rows, tried.there).result.auroc for each in every)
    return replace(best, result=replace(best.result, oracle=oracle))


def _best(every: Sequence[list[TrainedDetector]]) -> list[TrainedDetector]:
    return max(every, key=compute_validation_auroc)


def _without_choice(result: DetectorResult) -> DetectorResult:
    """Where there was nothing to choose, the test part could not have chosen better."""
    return replace(result, oracle=result.auroc)


@dataclass(frozen=True)
class FitTask:
    """A candidate with a seed, and the rows of that seed."""

    candidate: Candidate
    seed: int
    rows: DataSplits


def run_fits(wanted: Sequence[FitTask], tick: Callable[[], None]) -> list[TrainedDetector]:
    """What each fit makes, in the order of `wanted`; `tick` is called as each ends. To be called on a joined cluster.

    Raises what the first fit that failed raised; the others are cancelled then.
    """
    rows = {id(fit.rows): fit.rows for fit in wanted}
    kept = {key: ray.put(parts) for key, parts in rows.items()}
    task = ray.remote(num_cpus=1)(train_detector)
    references = [task.remote(fit.candidate, kept[id(fit.rows)], fit.seed) for fit in wanted]
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
