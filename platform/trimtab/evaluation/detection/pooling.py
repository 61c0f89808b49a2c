"""Detectors measured over seeds, each with a test part of its own; intervals cover questions and seeds (ours).

A question may be in the test parts of several seeds, so answers drawn anew for each seed would pass for fresh evidence. One
resample therefore draws the data set's questions once, with all their answers in all test parts, and crosses them with seeds,
of which one less than there are is picked (evaluate/seeds.py says why). The mean figure over the picked seeds is its value.
Test parts differ between seeds, so part of what questions do is counted with the seeds too: these intervals rather err on the
wide side. What is compared is compared on the same resamples.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimtab.evaluation.detection.metrics import METRICS, Floats, Labels, Metric, compute_auroc, compute_ece
from trimtab.stats.intervals import Interval

RESAMPLES = 1000
# A kind of question with fewer different answers of either class than this has no figure.
LEAST_OF_KIND = 10
NOTHING = Interval(float("nan"), float("nan"), float("nan"))

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class SeedRisks:
    """What a detector says of the n test answers of a seed: `at` [n] are their rows in the data set, `risk` [n] how probably
    they are made up, `raw` [n] the same before calibration, `made_up` [n] whether they are."""

    seed: int
    at: Rows
    risk: Floats
    raw: Floats
    made_up: Labels


@dataclass(frozen=True)
class DetectorResult:
    """A head or a score over seeds, chosen on validation: `chosen` says what; `validation` is its mean AUROC there, `oracle`
    the mean AUROC that choosing on test would have claimed, which no report may. `learned`: whether anything was trained;
    `tokens`: how many are generated for each answer beyond it."""

    name: str
    chosen: dict[str, Any]
    tests: Sequence[SeedRisks]
    validation: float
    oracle: float
    learned: bool = True
    tokens: float = 0.0

    @property
    def auroc(self) -> float:
        """On test, mean over the seeds."""
        return _compute_metrics(compute_auroc, self.tests)


@dataclass(frozen=True)
class PooledMetrics:
    """Figures as in evaluate/truth.py, means over seeds. `count` and `made_up`: different answers in all test parts."""

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
    """What is drawn once for all figures of a data set: `times` [R, Q] how often each question, `question` [N] of each answer,
    `picked` [R, seeds - 1] seeds by their place."""

    times: NDArray[np.uint8]
    question: Rows
    picked: Rows

    def get_counts(self, at: Rows) -> NDArray[np.uint8]:
        """How often answers [n] were drawn: [R, n]."""
        return self.times[:, self.question[at]]


@dataclass(frozen=True)
class KindResult:
    """How a detector does on questions of one kind; `auroc` is NaN where there are too few of a class."""

    source: str
    auroc: Interval
    count: int
    made_up: int


@dataclass(frozen=True)
class PairedDifference:
    """AUROC of `name` less that of `rival`, on the same answers; `beats` is whether the whole interval is above 0."""

    name: str
    rival: str
    auroc: Interval
    beats: bool


def draw_resamples(groups: Sequence[str], seeds: int, count: int = RESAMPLES) -> Resamples:
    """Draw from the questions of a data set's answers [N], those of one group together; the same groups give the same draws."""
    names, question = np.unique(groups, return_inverse=True)
    generator = np.random.default_rng(0)
    size = len(names)
    times = np.empty((count, size), dtype=np.uint8)
    for row in times:
        row[:] = np.bincount(generator.integers(size, size=size), minlength=size)
    picked = generator.integers(seeds, size=(count, max(1, seeds - 1)))
    return Resamples(times, question.reshape(-1).astype(np.int64), picked.astype(np.int64))


def measure_result(tests: Sequence[SeedRisks], drawn: Resamples) -> PooledMetrics:
    """All figures of a detector over its seeds."""
    answers = {int(at): bool(wrong) for t in tests for at, wrong in zip(t.at, t.made_up, strict=True)}
    return PooledMetrics(
        **{name: estimate_metrics(figure, tests, drawn) for name, figure in METRICS.items()},
        ece=float(np.mean([compute_ece(t.risk, t.made_up) for t in tests])),
        ece_raw=float(np.mean([compute_ece(t.raw, t.made_up) for t in tests])),
        count=len(answers),
        made_up=sum(answers.values()),
    )


def estimate_metrics(figure: Metric, tests: Sequence[SeedRisks], drawn: Resamples) -> Interval:
    """A figure, mean over seeds, with its 95 % interval over questions and seeds."""
    return _build_interval(_compute_metrics(figure, tests), _compute_spread(figure, tests, drawn))


def estimate_difference(ours: DetectorResult, rival: DetectorResult, drawn: Resamples) -> PairedDifference:
    """AUROC of one less that of the other, with a paired interval: both on the same resamples. Raises ValueError where their
    test parts differ."""
    for a, b in zip(ours.tests, rival.tests, strict=True):
        if not np.array_equal(a.at, b.at):
            raise ValueError(f"{ours.name} and {rival.name} were tested on different answers")
    found = split_by_kind(compute_auroc, ours.tests, rival.tests, drawn)
    return PairedDifference(ours.name, rival.name, found, found.low > 0)


def split_by_kind(figure: Metric, ours: Sequence[SeedRisks], theirs: Sequence[SeedRisks], drawn: Resamples) -> Interval:
    """A figure of one detector less that of another, with a paired 95 % interval: both on the same answers."""
    spread = _compute_spread(figure, ours, drawn) - _compute_spread(figure, theirs, drawn)
    return _build_interval(_compute_metrics(figure, ours) - _compute_metrics(figure, theirs), spread)


def measure_by_kind(tests: Sequence[SeedRisks], sources: Sequence[str], drawn: Resamples) -> list[KindResult]:
    """AUROC on the questions of each source [N], those with most answers first. A seed without both classes is left out."""
    names, kind = np.unique(sources, return_inverse=True)
    kinds = [
        _measure_kind(str(name), [_select_rows(t, kind[t.at] == index) for t in tests], drawn)
        for index, name in enumerate(names)
    ]
    return sorted((k for k in kinds if k.count), key=lambda k: (-k.count, k.source))


def result_as_json(result: DetectorResult, figures: PooledMetrics) -> dict[str, Any]:
    """What is chosen, its figures, and those of each seed by itself."""
    seeds = [
        {"seed": t.seed, "count": len(t.at), "made_up": int(t.made_up.sum())}
        | {name: float(figure(t.risk, t.made_up, _count_once(t))[0]) for name, figure in METRICS.items()}
        | {"ece": compute_ece(t.risk, t.made_up), "ece_raw": compute_ece(t.raw, t.made_up)}
        for t in result.tests
    ]
    return {
        "name": result.name,
        "learned": result.learned,
        "chosen": result.chosen,
        "validation_auroc": result.validation,
        "test": asdict(figures),
        "oracle_auroc": result.oracle,
        "tokens_generated": result.tokens,
        "oracle_gap": result.oracle - figures.auroc.value,
        "seeds": seeds,
    }


def _measure_kind(source: str, tests: Sequence[SeedRisks], drawn: Resamples) -> KindResult:
    answers = {int(at): bool(wrong) for t in tests for at, wrong in zip(t.at, t.made_up, strict=True)}
    made_up = sum(answers.values())
    whole = [place for place, t in enumerate(tests) if t.made_up.any() and not t.made_up.all()]
    if min(made_up, len(answers) - made_up) < LEAST_OF_KIND or not whole:
        return KindResult(source, NOTHING, len(answers), made_up)
    # Seeds that are left out must not be picked.
    picked = np.random.default_rng(0).integers(len(whole), size=(len(drawn.picked), max(1, len(whole) - 1)))
    mine = Resamples(drawn.times, drawn.question, picked.astype(np.int64))
    return KindResult(source, estimate_metrics(compute_auroc, [tests[i] for i in whole], mine), len(answers), made_up)


def _select_rows(t: SeedRisks, kept: Labels) -> SeedRisks:
    return SeedRisks(t.seed, t.at[kept], t.risk[kept], t.raw[kept], t.made_up[kept])


def _count_once(t: SeedRisks) -> NDArray[np.uint8]:
    return np.ones((1, len(t.at)), dtype=np.uint8)


def _compute_metrics(figure: Metric, tests: Sequence[SeedRisks]) -> float:
    return float(np.mean([figure(t.risk, t.made_up, _count_once(t))[0] for t in tests]))


def _compute_spread(figure: Metric, tests: Sequence[SeedRisks], drawn: Resamples) -> Floats:
    """The mean figure over the picked seeds in each resample [R]; NaN where a class is missing in one of them."""
    by_seed = np.stack([figure(t.risk, t.made_up, drawn.get_counts(t.at)) for t in tests], axis=1)
    return np.take_along_axis(by_seed, drawn.picked, 1).mean(1)


def _build_interval(value: float, spread: Floats) -> Interval:
    """Percentiles of the resamples that hold both classes, where these are most of them."""
    whole = spread[np.isfinite(spread)]
    if 2 * len(whole) < len(spread):
        return Interval(value, float("nan"), float("nan"))
    low, high = np.quantile(whole, [0.025, 0.975])
    return Interval(value, float(low), float(high))
