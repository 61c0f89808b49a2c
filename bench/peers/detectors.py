"""Untrained detector of the default settings, for benchmarks of its cost."""

from pathlib import Path

import torch

from trimtab import heads
from trimtab.detection.calibration import FALSE_POSITIVE_RATES
from trimtab.detection.detector import DetectorCard, build_detector, save_detector
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
