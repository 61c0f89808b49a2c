"""Sequential detection of a change in a stream of values, without assumptions on their distribution.

Conformal p-values (Vovk, Gammerman and Shafer 2005) of the stream against a reference sample are independent and uniform while
both have the same distribution. An e-detector (Shin, Ramdas and Rinaldo 2023, the Shiryaev-Roberts form) bets against this.
Without a change its alarm comes after at least `average_run_length` values on average; this holds for every distribution.
"""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# Bets on small and on large p-values, each with mean 1 over uniform p-values: lines for weak changes, powers for strong ones.
LINEAR, POWERS = np.array([-1.0, -0.5, 0.5, 1.0]), np.array([0.3, 0.6])
LEAST_P, MOST_EVIDENCE = 1e-6, 1e300
# Values that p-values are computed among; later ones are not added, so that memory is bounded.
MOST_VALUES = 20_000


@dataclass(frozen=True)
class ChangeResult:
    """Result of sequential detection.

    Attributes:
        statistic: evidence after each value [T]; its mean after t values without a change is at most t.
        alarm: number of values until the alarm; None without one.
        average_run_length: lower bound of the mean number of values until an alarm without a change.
    """

    statistic: Floats
    alarm: int | None
    average_run_length: float


class ChangeMonitor:
    """Evidence of a change in a stream, value by value.

    Args:
        reference: reference values.
        seed: seed of the randomized ties, which make the p-values exactly uniform.

    Attributes:
        count: number of values so far.
        evidence: evidence of a change: the mean of the Shiryaev-Roberts e-detectors of all bets.
    """

    def __init__(self, reference: Sequence[float], seed: int = 0) -> None:
        self.count = 0
        self.evidence = 0.0
        self._ordered = sorted(reference)
        self._generator = np.random.default_rng(seed)
        self._detectors = np.zeros(len(LINEAR) + 2 * len(POWERS))

    def update(self, value: float) -> float:
        """Add a value, and return the evidence after it."""
        return self.add_p_value(self.compute_p_value(value))

    def compute_p_value(self, value: float) -> float:
        """Return the p-value of a value among the reference and the earlier values; it is small for large values."""
        low, high = bisect_left(self._ordered, value), bisect_right(self._ordered, value)
        count = len(self._ordered)
        if count < MOST_VALUES:
            insort(self._ordered, value)
        return (count - high + self._generator.random() * (high - low + 1)) / (count + 1)

    def add_p_value(self, p_value: float) -> float:
        """Add a p-value, and return the evidence after it."""
        p = min(max(p_value, LEAST_P), 1 - LEAST_P)
        powers = [POWERS * tail ** (POWERS - 1) for tail in (p, 1 - p)]
        factors = np.concatenate([1 + LINEAR * (p - 0.5), *powers])
        self._detectors = np.minimum((self._detectors + 1) * factors, MOST_EVIDENCE)
        self.count += 1
        self.evidence = float(self._detectors.mean())
        return self.evidence


def detect_change(
    references: Sequence[Floats], streams: Sequence[Floats], average_run_length: float, seed: int = 0
) -> ChangeResult:
    """Detect a change of one or several statistics of the same values.

    Args:
        references: reference values of each statistic.
        streams: values of each statistic in the order of time, all of the same length T.
        average_run_length: lower bound of the mean number of values until an alarm without a change.
        seed: seed of the randomized ties.
    """
    monitors = [ChangeMonitor(reference.tolist(), seed + index) for index, reference in enumerate(references)]
    evidence = [[monitor.update(value) for value in stream.tolist()] for monitor, stream in zip(monitors, streams, strict=True)]
    # A mean of e-detectors is an e-detector.
    statistic = np.mean(evidence, axis=0)
    above = np.flatnonzero(statistic >= average_run_length)
    return ChangeResult(statistic, int(above[0]) + 1 if len(above) else None, average_run_length)
