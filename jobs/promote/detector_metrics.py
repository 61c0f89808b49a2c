"""Figures for the gate of detectors: the version and its champion read the same labelled answers."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from trimtab.detection.detector import Detector
from trimtab.detection.training import compute_traces
from trimtab.errors import UsageError
from trimtab.evaluation.detection.metrics import METRICS
from trimtab.evaluation.detection.pooling import Resamples, SeedRisks, draw_resamples, estimate_metrics, split_by_kind
from trimtab.evaluation.promotion_rules import Found, PromotionRule
from trimtab.jobs.collect.signal_dataset import SignalDataset, read_dataset
from trimtab.jobs.promote.config import PromoteConfig
from trimtab.model.base_model import BaseModel
from trimtab.tracking import registry
from trimtab.tracking.registry import Version
from trimtab.util.remote_paths import open_folder


def measure_detector(
    config: PromoteConfig, base: BaseModel, rules: Sequence[PromotionRule], version: Version, champion: Version | None
) -> Mapping[PromotionRule, Found]:
    """What each rule's figure is, and how much more than the champion's. Raises UsageError for rules that cannot be checked."""
    for rule in rules:
        if rule.metric not in METRICS:
            raise UsageError(f"rule on {rule.metric}: a detector has {', '.join(METRICS)} on a set")
    found: dict[PromotionRule, Found] = {}
    detectors = [registry.load_detector(each, base) for each in (version, champion) if each is not None]
    for name in dict.fromkeys(rule.set or "" for rule in rules):
        data = read_dataset(open_folder(name), base)
        read = [compute_risks(each, data, name) for each in detectors]
        drawn = draw_resamples(data.groups, 1)
        found |= {rule: _figures(rule, read, drawn) for rule in rules if rule.set == name}
    return found


def compute_risks(detector: Detector, data: SignalDataset, name: str) -> SeedRisks:
    """What a detector says of a set's labelled answers. Raises UsageError where it learned from them, or cannot read them."""
    card = detector.card
    if any(entry.get("digest") == data.digest for entry in card.data):
        raise UsageError(f"{card.name} learned from {name}: a gate needs answers that it has not seen")
    if missing := set(card.layers) - set(data.meta.layers):
        raise UsageError(f"{card.name} reads layer {min(missing)}, which {name} does not hold: collect it with --layers")
    at = torch.nonzero(~data.truthful.isnan()).squeeze(1)
    made_up = (data.truthful[at] == 0).numpy()
    if made_up.all() or not made_up.any():
        raise UsageError(f"{name} must hold both right and made-up answers with labels")
    risk = compute_risk_at(detector, data, at).double().numpy()
    return SeedRisks(0, at.numpy().astype(np.int64), risk, risk, made_up)


def compute_risk_at(detector: Detector, data: SignalDataset, at: Tensor) -> Tensor:
    """Risks [n] of answers by their rows [n], read by the detector's own tau_l, normaliser and layers."""
    layers = [data.meta.layers.index(layer) for layer in detector.card.layers]
    phi = compute_traces([data.traces[i] for i in at.tolist()], detector.card.low)
    return detector.compute_risk(data.psi[at][:, layers], phi)


def _figures(rule: PromotionRule, read: Sequence[SeedRisks], drawn: Resamples) -> Found:
    figure = METRICS[rule.metric]
    found = estimate_metrics(figure, read[:1], drawn)
    more = split_by_kind(figure, read[:1], read[1:], drawn) if len(read) > 1 else None
    return found, more
