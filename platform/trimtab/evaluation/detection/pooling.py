"""Pooling of detector metrics over seeds, with bootstrap intervals over questions and seeds.

Each seed has its own test part, and a question may be in the test parts of several seeds. Answers drawn anew for each seed
would therefore count as independent evidence. Instead, a resample draws the questions of the data set once, with all their
answers in all test parts, and crosses them with one seed fewer than there are, for the reason given in
`trimtab.evaluation.safety.comparison`. The value of a resample is the mean metric over the drawn seeds. Since test parts differ
between seeds, some of the variance over questions also counts as variance over seeds, so the intervals tend to be too wide.
Compared detectors share their resamples.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimtab.evaluation.detection.metrics import METRICS, Floats, Labels, Metric, compute_auroc, compute_ece
from trimtab.stats.intervals import Interval

RESAMPLES = 1000
# Minimum number of distinct answers of each class for the AUROC of a kind of question.
LEAST_OF_KIND = 10
NOTHING = Interval(float("nan"), float("nan"), float("nan"))

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class SeedRisks:
    """Risks that a detector assigns to the n test or validation answers of a seed.

    Attributes:
        seed: the seed.
        at: rows of the answers in the data set [n].
        risk: calibrated probability that each answer is made up [n].
        raw: the same before calibration [n].
        made_up: labels [n].
    """

    seed: int
    at: Rows
    risk: Floats
    raw: Floats
    made_up: Labels


@dataclass(frozen=True)
class DetectorResult:
    """Test risks of a head or a score over seeds, with layers and settings selected on validation.

    Attributes:
        name: name of the head or score.
        chosen: selected layers and settings.
        tests: risks on the test part of each seed.
        validation: mean AUROC on validation.
        oracle: mean AUROC that selection on the test part would have claimed; an upper bound, not a result.
        learned: whether the detector was trained.
        tokens: number of extra tokens that the detector generates per answer.
        validations: risks on the validation part of each seed, for the promotion gate.
    """

    name: str
    chosen: dict[str, Any]
    tests: Sequence[SeedRisks]
    validation: float
    oracle: float
    learned: bool = True
    tokens: float = 0.0
    validations: Sequence[SeedRisks] = ()

    @property
    def auroc(self) -> float:
        """Mean AUROC on test over the seeds."""
        return compute_mean(compute_auroc, self.tests)


@dataclass(frozen=True)
class PooledMetrics:
    """Metrics of `trimtab.evaluation.detection.metrics`, averaged over seeds.

    Attributes:
        auroc: area under the ROC curve.
        auprc: average precision.
        fpr95: false positive rate at 95 % recall.
        aurc: area under the risk-coverage curve.
        ece: expected calibration error.
        ece_raw: expected calibration error before calibration.
        count: number of distinct answers in all test parts.
        made_up: number of distinct made-up answers in all test parts.
    """

    auroc: Interval
    auprc: Interval
    fpr95: Interval
    aurc: Interval
    ece: float
    ece_raw: float
    count: int
    made_up: int


@dataclass(frozen=True)
class Resamples:
    """Bootstrap resamples of a data set, shared by all its metrics.

    Attributes:
        times: how often each resample drew each question [R, Q].
        question: index of the question of each answer [N].
        picked: indices of the drawn seeds [R, max(1, seeds - 1)].
    """

    times: NDArray[np.uint8]
    question: Rows
    picked: Rows

    def get_counts(self, rows: Rows) -> NDArray[np.uint8]:
        """Return how often each resample drew the answers at the given rows [n]: counts [R, n]."""
        return self.times[:, self.question[rows]]


@dataclass(frozen=True)
class KindResult:
    """AUROC of a detector on the questions of one source; NaN if there are too few answers of a class.

    Attributes:
        source: source of the questions.
        auroc: AUROC with its interval.
        count: number of distinct answers.
        made_up: number of distinct made-up answers.
    """

    source: str
    auroc: Interval
    count: int
    made_up: int


@dataclass(frozen=True)
class PairedDifference:
    """Paired difference in AUROC of two detectors on the same answers.

    Attributes:
        name: name of the first detector.
        rival: name of the second detector.
        auroc: AUROC of `name` minus that of `rival`.
        beats: whether the whole interval lies above 0.
    """

    name: str
    rival: str
    auroc: Interval
    beats: bool


def draw_resamples(groups: Sequence[str], seeds: int, count: int = RESAMPLES) -> Resamples:
    """Draw bootstrap resamples of the questions of a data set and of the seeds. The same arguments give the same draws.

    Args:
        groups: question group of each answer [N]; answers of one group are drawn together.
        seeds: number of seeds.
        count: number of resamples.
    """
    names, question = np.unique(groups, return_inverse=True)
    generator = np.random.default_rng(0)
    size = len(names)
    times = np.empty((count, size), dtype=np.uint8)
    for row in times:
        row[:] = np.bincount(generator.integers(size, size=size), minlength=size)
    picked = generator.integers(seeds, size=(count, max(1, seeds - 1)))
    return Resamples(times, question.reshape(-1).astype(np.int64), picked.astype(np.int64))


def measure_result(tests: Sequence[SeedRisks], resamples: Resamples) -> PooledMetrics:
    """Compute all metrics of a detector over its seeds.

    Args:
        tests: risks on the test part of each seed.
        resamples: resamples of the data set.
    """
    answers = {int(row): bool(wrong) for t in tests for row, wrong in zip(t.at, t.made_up, strict=True)}
    return PooledMetrics(
        **{name: estimate_metric(metric, tests, resamples) for name, metric in METRICS.items()},
        ece=float(np.mean([compute_ece(t.risk, t.made_up) for t in tests])),
        ece_raw=float(np.mean([compute_ece(t.raw, t.made_up) for t in tests])),
        count=len(answers),
        made_up=sum(answers.values()),
    )


def estimate_metric(metric: Metric, tests: Sequence[SeedRisks], resamples: Resamples) -> Interval:
    """Compute the mean of a metric over seeds, with its 95 % interval over questions and seeds.

    Args:
        metric: the metric to compute.
        tests: risks on the test part of each seed.
        resamples: resamples of the data set.

    Returns:
        The mean; its interval is NaN if most resamples lack a class.
    """
    return _build_interval(compute_mean(metric, tests), _compute_spread(metric, tests, resamples))


def estimate_difference(first: DetectorResult, rival: DetectorResult, resamples: Resamples) -> PairedDifference:
    """Compute the AUROC of one detector minus that of another, with a paired 95 % interval.

    Args:
        first: result of the first detector.
        rival: result of the second detector.
        resamples: resamples of the data set, shared by both.

    Raises:
        ValueError: if the test parts of the two detectors differ.
    """
    for a, b in zip(first.tests, rival.tests, strict=True):
        if not np.array_equal(a.at, b.at):
            raise ValueError(f"{first.name} and {rival.name} were tested on different answers")
    difference = estimate_paired_difference(compute_auroc, first.tests, rival.tests, resamples)
    return PairedDifference(first.name, rival.name, difference, difference.low > 0)


def estimate_paired_difference(
    metric: Metric, first: Sequence[SeedRisks], rival: Sequence[SeedRisks], resamples: Resamples
) -> Interval:
    """Compute a metric of one detector minus that of another on the same answers, with a paired 95 % interval.

    Args:
        metric: the metric to compare.
        first: risks of the first detector on the test part of each seed.
        rival: risks of the second detector on the same test parts.
        resamples: resamples of the data set, shared by both.
    """
    spread = _compute_spread(metric, first, resamples) - _compute_spread(metric, rival, resamples)
    return _build_interval(compute_mean(metric, first) - compute_mean(metric, rival), spread)


def measure_by_kind(tests: Sequence[SeedRisks], sources: Sequence[str], resamples: Resamples) -> list[KindResult]:
    """Compute the AUROC on the questions of each source; seeds whose test answers are all of one class are left out.

    Args:
        tests: risks on the test part of each seed.
        sources: source of the question of each answer [N].
        resamples: resamples of the data set.

    Returns:
        Results by source, in descending order of the number of answers.
    """
    names, kind = np.unique(sources, return_inverse=True)
    kinds = [
        _measure_kind(str(name), [_select_rows(t, kind[t.at] == index) for t in tests], resamples)
        for index, name in enumerate(names)
    ]
    return sorted((k for k in kinds if k.count), key=lambda k: (-k.count, k.source))


def result_as_json(result: DetectorResult, metrics: PooledMetrics) -> dict[str, Any]:
    """Convert a result to JSON: the selected layers and settings, the pooled metrics, and the metrics of each seed.

    Args:
        result: result of the detector.
        metrics: its pooled metrics.
    """
    seeds = [
        {"seed": t.seed, "count": len(t.at), "made_up": int(t.made_up.sum())}
        | {name: float(metric(t.risk, t.made_up, _count_once(t))[0]) for name, metric in METRICS.items()}
        | {"ece": compute_ece(t.risk, t.made_up), "ece_raw": compute_ece(t.raw, t.made_up)}
        for t in result.tests
    ]
    return {
        "name": result.name,
        "learned": result.learned,
        "chosen": result.chosen,
        "validation_auroc": result.validation,
        "test": asdict(metrics),
        "oracle_auroc": result.oracle,
        "tokens_generated": result.tokens,
        "oracle_gap": result.oracle - metrics.auroc.value,
        "seeds": seeds,
    }


def _measure_kind(source: str, tests: Sequence[SeedRisks], resamples: Resamples) -> KindResult:
    answers = {int(row): bool(wrong) for t in tests for row, wrong in zip(t.at, t.made_up, strict=True)}
    made_up = sum(answers.values())
    usable = [t for t in tests if t.made_up.any() and not t.made_up.all()]
    if min(made_up, len(answers) - made_up) < LEAST_OF_KIND or not usable:
        return KindResult(source, NOTHING, len(answers), made_up)
    # Seeds are drawn anew, since the shared draws include the seeds that are left out.
    picked = np.random.default_rng(0).integers(len(usable), size=(len(resamples.picked), max(1, len(usable) - 1)))
    own_resamples = Resamples(resamples.times, resamples.question, picked.astype(np.int64))
    return KindResult(source, estimate_metric(compute_auroc, usable, own_resamples), len(answers), made_up)


def _select_rows(t: SeedRisks, mask: Labels) -> SeedRisks:
    return SeedRisks(t.seed, t.at[mask], t.risk[mask], t.raw[mask], t.made_up[mask])


def _count_once(t: SeedRisks) -> NDArray[np.uint8]:
    return np.ones((1, len(t.at)), dtype=np.uint8)


def compute_mean(metric: Metric, tests: Sequence[SeedRisks]) -> float:
    """Compute the mean of a metric over seeds.

    Args:
        metric: the metric to compute.
        tests: risks of each seed.
    """
    return float(np.mean([metric(t.risk, t.made_up, _count_once(t))[0] for t in tests]))


def _compute_spread(metric: Metric, tests: Sequence[SeedRisks], resamples: Resamples) -> Floats:
    """Compute the mean metric over the drawn seeds of each resample [R]; NaN if one of them lacks a class."""
    by_seed = np.stack([metric(t.risk, t.made_up, resamples.get_counts(t.at)) for t in tests], axis=1)
    return np.take_along_axis(by_seed, resamples.picked, 1).mean(1)


def _build_interval(value: float, spread: Floats) -> Interval:
    """Build the percentile interval of the finite resamples; NaN if fewer than half of them are finite."""
    finite = spread[np.isfinite(spread)]
    if 2 * len(finite) < len(spread):
        return Interval(value, float("nan"), float("nan"))
    low, high = np.quantile(finite, [0.025, 0.975])
    return Interval(value, float(low), float(high))
