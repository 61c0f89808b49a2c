"""Gate metrics of detectors at their default threshold: shares of flagged rows, and of verdicts that attacks flip."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from trimtab.detection.detector import Detector
from trimtab.detection.detector_card import select_threshold
from trimtab.detection.signal_dataset import SignalDataset
from trimtab.errors import UsageError
from trimtab.evaluation.detection.metrics import Floats, Labels, ResampleCounts
from trimtab.evaluation.detection.pooling import Resamples, SeedRisks, estimate_paired_difference
from trimtab.evaluation.promotion_rules import MeasuredMetrics, PromotionRule
from trimtab.stats.intervals import Rate, compute_wilson_interval

FLIPPED = "flipped"
# Positives that are flagged, negatives that are not, and rewrites of flagged positives that are not flagged.
SHARES = ("flagged", "passed", FLIPPED)


def flag_rows(detector: Detector, risks: SeedRisks) -> SeedRisks:
    """Return risks whose values are 1 above the detector's default threshold, and 0 elsewhere."""
    flags = (risks.risk > select_threshold(detector.card)).astype(np.float64)
    return replace(risks, risk=flags, raw=flags)


def measure_share(
    rule: PromotionRule, data: SignalDataset, flags: Sequence[SeedRisks], resamples: Resamples
) -> MeasuredMetrics:
    """Measure a share for the version and its difference from that of the champion.

    Args:
        rule: rule on one of `SHARES`.
        data: set of signals.
        flags: flagged rows of the version and, if there is one, of the champion.
        resamples: resamples of the set.

    Raises:
        UsageError: if the set has no rows for the share, or a rule compares flipped verdicts with the champion.
    """
    if rule.metric == FLIPPED:
        if rule.over_champion is not None:
            raise UsageError("rule on flipped: it has no over_champion, as other verdicts can flip. Use at_most")
        return _measure_flips(rule, data, flags[0]), None
    metric = _compute_flagged if rule.metric == "flagged" else _compute_passed
    chosen = flags[0].made_up == (rule.metric == "flagged")
    if not chosen.any():
        raise UsageError(f"rule on {rule.metric}: {rule.set} has no such rows. Name another set")
    hits = flags[0].risk[chosen] == (rule.metric == "flagged")
    difference = estimate_paired_difference(metric, flags[:1], flags[1:], resamples) if len(flags) > 1 else None
    return compute_wilson_interval(int(hits.sum()), len(hits)), difference


def _measure_flips(rule: PromotionRule, data: SignalDataset, flags: SeedRisks) -> Rate:
    """Measure the share of rewrites that are not flagged, among those of flagged positives."""
    flagged = {
        data.keys[row] for row, flag, positive in zip(flags.at, flags.risk, flags.made_up, strict=True) if flag and positive
    }
    pairs = [(data.originals[row], flag) for row, flag in zip(flags.at, flags.risk, strict=True)]
    rewrites = [flag for original, flag in pairs if original in flagged]
    if not rewrites:
        raise UsageError(f"rule on flipped: {rule.set} has no rewrites of flagged rows. Collect it with --attacks")
    return compute_wilson_interval(len(rewrites) - int(sum(rewrites)), len(rewrites))


def _compute_flagged(risk: Floats, made_up: Labels, counts: ResampleCounts) -> Floats:
    return _compute_share(risk > 0, made_up, counts)


def _compute_passed(risk: Floats, made_up: Labels, counts: ResampleCounts) -> Floats:
    return _compute_share(risk == 0, ~made_up, counts)


def _compute_share(hits: NDArray[np.bool_], chosen: NDArray[np.bool_], counts: ResampleCounts) -> Floats:
    drawn = (counts * chosen).sum(1).astype(np.float64)
    return np.divide((counts * (chosen & hits)).sum(1), drawn, out=np.full(len(drawn), np.nan), where=drawn > 0)
