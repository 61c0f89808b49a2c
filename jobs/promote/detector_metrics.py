"""Gate metrics of detectors, with the version and its champion on the same labeled answers."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from trimtab.detection.detector import Detector
from trimtab.detection.signal_dataset import SignalDataset, read_dataset
from trimtab.detection.subject_terms import TERMS
from trimtab.detection.training import compute_traces
from trimtab.errors import UsageError
from trimtab.evaluation.detection.metrics import METRICS
from trimtab.evaluation.detection.pooling import (
    Resamples,
    SeedRisks,
    draw_resamples,
    estimate_metric,
    estimate_paired_difference,
)
from trimtab.evaluation.promotion_rules import MeasuredMetrics, PromotionRule
from trimtab.jobs.promote.config import PromoteConfig
from trimtab.jobs.promote.flagged_shares import SHARES, flag_rows, measure_share
from trimtab.model.base_model import BaseModel
from trimtab.tracking import registry
from trimtab.tracking.registry import Version
from trimtab.util.remote_paths import open_folder


def measure_detector(
    config: PromoteConfig, base: BaseModel, rules: Sequence[PromotionRule], version: Version, champion: Version | None
) -> Mapping[PromotionRule, MeasuredMetrics]:
    """Measure the metrics of rules on sets of signals. Arguments and return value are those of `measure_prefix`.

    Raises:
        UsageError: if a rule cannot be checked.
        ArtifactError: if a set or a detector cannot be read.
    """
    for rule in rules:
        if rule.metric not in (*METRICS, *SHARES):
            names = ", ".join((*METRICS, *SHARES))
            raise UsageError(f"rule on {rule.metric}: not a metric of detectors on a set. Use {names}")
    metrics: dict[PromotionRule, MeasuredMetrics] = {}
    detectors = [registry.load_detector(v, base) for v in (version, champion) if v is not None]
    for name in dict.fromkeys(rule.set or "" for rule in rules):
        data = read_dataset(open_folder(name), base)
        risks = [compute_risks(detector, data, name) for detector in detectors]
        flags = [flag_rows(detector, listed) for detector, listed in zip(detectors, risks, strict=True)]
        resamples = draw_resamples(data.groups, 1)
        for rule in (rule for rule in rules if rule.set == name):
            if rule.metric in SHARES:
                metrics[rule] = measure_share(rule, data, flags, resamples)
            else:
                _check_both_classes(risks[0], detectors[0], name)
                metrics[rule] = _compute_metric(rule, risks, resamples)
    return metrics


def compute_risks(detector: Detector, data: SignalDataset, name: str) -> SeedRisks:
    """Compute the risks of the labeled answers of a set.

    Args:
        detector: detector.
        data: set of signals.
        name: name of the set in error messages.

    Raises:
        UsageError: if the detector was trained on the set, or the set lacks one of its layers.
    """
    card = detector.card
    if any(entry.get("digest") == data.digest for entry in card.data):
        raise UsageError(f"{card.name} was trained on {name}. Use a set that was not in its training data")
    if card.subject != data.meta.subject:
        raise UsageError(f"{card.name} flags {TERMS[card.subject].positives}, but {name} holds {TERMS[data.meta.subject].rows}")
    if missing := set(card.layers) - set(data.meta.layers):
        raise UsageError(f"{card.name} reads layer {min(missing)}, which {name} does not have. Collect the set with --layers")
    indices = torch.nonzero(~data.truthful.isnan()).squeeze(1)
    return build_risks(data, indices, compute_risk_at(detector, data, indices))


def build_risks(data: SignalDataset, indices: Tensor, risk: Tensor) -> SeedRisks:
    """Combine the risks [n] of labeled rows with their labels.

    Args:
        data: data set.
        indices: rows [n] of the data set.
        risk: risks [n].
    """
    risks = risk.double().numpy()
    return SeedRisks(0, indices.numpy().astype(np.int64), risks, risks, (data.truthful[indices] == 0).numpy())


def compute_risk_at(detector: Detector, data: SignalDataset, indices: Tensor) -> Tensor:
    """Compute the risks [n] of answers, with the tau_l, normalizer and layers of the detector.

    Args:
        detector: detector.
        data: data set.
        indices: rows [n] of the answers in the data set.
    """
    layers = [data.meta.layers.index(layer) for layer in detector.card.layers]
    if detector.card.subject == "prompt":
        windows = [None if (window := data.windows[i]) is None else window[:, layers] for i in indices.tolist()]
        return detector.score_prompts(data.psi[indices][:, layers], windows)
    phi = compute_traces([data.traces[i] for i in indices.tolist()], detector.card.low_log_probability)
    return detector.compute_risk(data.psi[indices][:, layers], phi)


def _check_both_classes(risks: SeedRisks, detector: Detector, name: str) -> None:
    if risks.made_up.all() or not risks.made_up.any():
        terms = TERMS[detector.card.subject]
        raise UsageError(f"{name} must have both {terms.negatives} and {terms.positives} with labels")


def _compute_metric(rule: PromotionRule, risks: Sequence[SeedRisks], resamples: Resamples) -> MeasuredMetrics:
    metric = METRICS[rule.metric]
    estimate = estimate_metric(metric, risks[:1], resamples)
    difference = estimate_paired_difference(metric, risks[:1], risks[1:], resamples) if len(risks) > 1 else None
    return estimate, difference
