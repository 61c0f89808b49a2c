"""Sequential detection of a change in a stream of values, without assumptions on their distribution.

Conformal p-values (Vovk, Gammerman and Shafer 2005) of the stream against a reference sample are independent and uniform while
as both have the same distribution. An e-detector (Shin, Ramdas and Rinaldo 2023, the Shiryaev-Roberts form) bets against this.
Without a change its alarm comes after at least `average_run_length` values on average; this holds for every distribution.
"""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# Bets on small and on large p-values, each with mean 1 over uniform p-values: lines for weak changes, powers for strong ones.
LINEAR, POWERS = (-1.0, -0.5, 0.5, 1.0), (0.3, 0.6)
LEAST_P = 1e-6


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
    generator = np.random.default_rng(seed)
    pairs = zip(references, streams, strict=True)
    p_values = [compute_conformal_p_values(reference, stream, generator) for reference, stream in pairs]
    # A mean of e-detectors is an e-detector.
    statistic = np.mean([compute_evidence(p) for p in p_values], axis=0)
    above = np.flatnonzero(statistic >= average_run_length)
    return ChangeResult(statistic, int(above[0]) + 1 if len(above) else None, average_run_length)


def compute_conformal_p_values(reference: Floats, stream: Floats, generator: np.random.Generator) -> Floats:
    """Compute the p-value of each value of a stream among the reference and the earlier values; small for large values.

    Args:
        reference: reference values.
        stream: values in the order of time [T].
        generator: generator of the randomized ties, which make the p-values exactly uniform.

    Returns:
        P-values [T].
    """
    ordered = sorted(reference.tolist())
    draws = generator.random(len(stream))
    result = np.empty(len(stream))
    for index, value in enumerate(stream.tolist()):
        low, high = bisect_left(ordered, value), bisect_right(ordered, value)
        result[index] = (len(ordered) - high + draws[index] * (high - low + 1)) / (len(ordered) + 1)
        insort(ordered, value)
    return result


def compute_evidence(p_values: Floats) -> Floats:
    """Compute the evidence of a change after each p-value [T]: the mean of the Shiryaev-Roberts e-detectors of all bets."""
    p = np.clip(p_values, LEAST_P, 1.0)
    mirrored = np.clip(1 - p_values, LEAST_P, 1.0)
    factors = [1 + slope * (p - 0.5) for slope in LINEAR]
    factors += [power * values ** (power - 1) for power in POWERS for values in (p, mirrored)]
    return np.mean([_accumulate(factor) for factor in factors], axis=0)


def _accumulate(factors: Floats) -> Floats:
    evidence, result = 0.0, np.empty(len(factors))
    for index, factor in enumerate(factors.tolist()):
        evidence = min((evidence + 1) * factor, 1e300)
        result[index] = evidence
    return result
