"""Promotion gate of newly trained detectors.

On validation, a detector must rank answers better than the training-free scores and the current champion.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from trimtab.detection.detector import Detector
from trimtab.detection.signal_dataset import SignalDataset
from trimtab.detection.subject_terms import TERMS
from trimtab.errors import ArtifactError
from trimtab.evaluation.detection.metrics import compute_auroc
from trimtab.evaluation.detection.pooling import (
    DetectorResult,
    Resamples,
    SeedRisks,
    compute_mean,
    draw_resamples,
    estimate_paired_difference,
)
from trimtab.evaluation.gate import Gain, GateDecision, decide_on_gain
from trimtab.jobs.detect.config import DetectConfig
from trimtab.jobs.detect.reserved_labels import MIN_LABELS, compare_on_reserved, select_evidence
from trimtab.jobs.promote.detector_metrics import compute_risk_at
from trimtab.model.base_model import BaseModel
from trimtab.tracking import registry
from trimtab.tracking.registry import Version


def check_gate(
    config: DetectConfig,
    base: BaseModel,
    data: SignalDataset,
    results: Sequence[DetectorResult],
    seed: int,
    detector: Detector,
    reserved: SignalDataset | None = None,
) -> GateDecision:
    """Decide whether a new detector may become champion of its name.

    Training-free scores are compared over all seeds, because the AUROC of a single seed depends on its split. The current
    champion is compared on the same validation answers as the new detector. The champion may have been trained on these
    answers, which can only favor it. With data of live traffic, it is compared on reserved labels of trusted raters instead.
    The first champion of a name is promoted by point estimate.

    Args:
        config: settings of the job.
        base: base model.
        data: data set that the detector was trained on.
        results: results of all heads and scores, the new detector's first.
        seed: seed of the new detector.
        detector: new detector.
        reserved: reserved rows of live traffic; None if the data set has no live rows.
    """
    first = results[0]
    resamples = draw_resamples(data.groups, len(first.validations))
    # Prompts have no training-free scores: a detector must rank them better than a constant risk does.
    untrained = [(r.name, r.validations) for r in results if not r.learned] or [("a constant", _flatten(first.validations))]
    gains = [_compare(name, first.validations, risks, resamples) for name, risks in untrained]
    version = registry.find_champion(base.name, config.name)
    if version is not None:
        rival = f"champion v{version.version}"
        try:
            champion = _load_champion(version, base, data)
        except ArtifactError as error:
            return GateDecision(False, f"cannot compare with champion version {version.version}: {error}")
        if reserved is None:
            own = next(risks for risks in first.validations if risks.seed == seed)
            other = _measure_champion(champion, data, own)
            gains.append(_compare(rival, [own], [other], draw_resamples(data.groups, 1)))
        elif (gain := compare_on_reserved(detector, champion, reserved, rival)) is not None:
            gains.append(gain)
        else:
            count = len(select_evidence(reserved))
            reason = f"{count} reserved labels of trusted raters; the gate needs {MIN_LABELS} of each class"
            return GateDecision(False, f"not decided: {reason}. Label more answers: trimtab feedback ask", decided=False)
    worst = min(gains, key=lambda gain: gain.difference.value)
    return decide_on_gain(worst, config.gate.min_improvement, "point" if version is None else config.gate.rule)


def _compare(rival: str, first: Sequence[SeedRisks], other: Sequence[SeedRisks], resamples: Resamples) -> Gain:
    values = [compute_mean(compute_auroc, risks) for risks in (first, other)]
    difference = estimate_paired_difference(compute_auroc, first, other, resamples)
    answers = len(np.unique(np.concatenate([risks.at for risks in first])))
    return Gain("AUROC", values[0], rival, values[1], difference, answers, "validation rows")


def _flatten(risks: Sequence[SeedRisks]) -> list[SeedRisks]:
    return [replace(r, risk=np.zeros_like(r.risk), raw=np.zeros_like(r.raw)) for r in risks]


def _load_champion(version: Version, base: BaseModel, data: SignalDataset) -> Detector:
    """Load the champion.

    Raises:
        ArtifactError: if the champion cannot be loaded, or cannot score the rows of a data set.
    """
    champion = registry.load_detector(version, base)
    if reason := _check_comparable(champion, data):
        raise ArtifactError(f"it {reason}")
    return champion


def _measure_champion(champion: Detector, data: SignalDataset, own: SeedRisks) -> SeedRisks:
    """Compute the champion's risks of the validation answers of a new detector."""
    risk = compute_risk_at(champion, data, torch.from_numpy(own.at)).double().numpy()
    return SeedRisks(own.seed, own.at, risk, risk, own.made_up)


def _check_comparable(champion: Detector, data: SignalDataset) -> str | None:
    """Return why a champion cannot score these rows, or None if it can."""
    if champion.card.subject != data.meta.subject:
        return f"is a detector of {TERMS[champion.card.subject].positives}"
    if missing := set(champion.card.layers) - set(data.meta.layers):
        return f"reads layer {min(missing)}, which was not collected"
    return "was trained under another prefix" if champion.card.prefix_digest != data.meta.prefix_digest else None
