"""Untrained detectors of the default settings, for benchmarks of their cost."""

from dataclasses import replace
from pathlib import Path

import torch

from trimtab import heads
from trimtab.detection.calibration import FALSE_POSITIVE_RATES
from trimtab.detection.detector import build_detector, save_detector
from trimtab.detection.detector_card import DetectorCard
from trimtab.model.base_model import BaseModel

LAYERS = (20, 29)


def save_untrained_detector(base: BaseModel, folder: Path) -> Path:
    """Save a detector `truth` as champion in a folder that serves as registry; return the folder of its version."""
    head_options, limits = {"groups": 8}, dict.fromkeys(FALSE_POSITIVE_RATES, 0.5)
    card = DetectorCard("truth", base.name, base.fingerprint, list(LAYERS), base.width, "flag", head_options, -2.0, limits)
    head = heads.get_head("flag")(base.width, len(LAYERS), **head_options)
    spread = torch.stack([torch.zeros(7), torch.ones(7)])
    saved = save_detector(build_detector(head, spread, torch.tensor([0.01, 0.0]), card), folder / "truth" / "1")
    (folder / "truth" / "aliases.json").write_text('{"champion": 1}')
    return saved


def save_untrained_guard(base: BaseModel, folder: Path, layer: int) -> Path:
    """Save a detector of prompts `guard` as champion in a folder that serves as registry; return the folder of its version."""
    options, thresholds = {"parts": 2}, {"balanced": 0.5}
    card = DetectorCard("guard", base.name, base.fingerprint, [layer], base.width, "linear", options, -2.0, thresholds)
    head = heads.get_head("linear")(base.width, 1, **options)
    spread = torch.stack([torch.zeros(7), torch.ones(7)])
    # With this calibration, no risk reaches the threshold: refused requests have no tokens to measure.
    detector = build_detector(head, spread, torch.tensor([0.0, 2.0]), replace(card, subject="prompt"))
    saved = save_detector(detector, folder / "guard" / "1")
    (folder / "guard" / "aliases.json").write_text('{"champion": 1}')
    return saved
