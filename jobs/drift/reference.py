"""Reference of a drift measurement: rows that a detector was trained with, and their risks outside of its training rows."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trimtab.detection.detector import Detector
from trimtab.detection.live_labels import EVIDENCE
from trimtab.detection.merged_dataset import merge_datasets, read_datasets
from trimtab.detection.signal_dataset import SignalDataset
from trimtab.errors import UsageError
from trimtab.jobs.drift.config import DriftConfig
from trimtab.jobs.promote.detector_metrics import compute_risk_at
from trimtab.jobs.runtime.config import as_source_list
from trimtab.model.base_model import BaseModel
from trimtab.tracking.registry import Version
from trimtab.tracking.run_artifacts import read_json_artifact

# Rows that a reference needs, half of which define the distance of states.
MIN_ROWS = 100


@dataclass(frozen=True)
class Reference:
    """Reference of a drift measurement.

    Attributes:
        data: N rows.
        risk: risks [N] by the detector, which was not trained on these rows.
        until: time of the last stored answer in the training data (seconds since 1970); minus infinity if there is none.
    """

    data: SignalDataset
    risk: Tensor
    until: float


def read_reference(config: DriftConfig, base: BaseModel, version: Version, detector: Detector) -> Reference:
    """Read the reference of a detector.

    If the detector was trained on stored answers, its reference are those that it had no label of, or that were reserved.
    Otherwise these are the rows of its validation and test part.

    Raises:
        UsageError: if there are too few such rows.
        ArtifactError: if a data set cannot be read.
    """
    folders = as_source_list(config.reference) or [str(entry["name"]) for entry in detector.card.data]
    if not folders:
        raise UsageError(f"the card of {config.detector} names no training data. Pass --reference FOLDER, data of its kind")
    merged = merge_datasets(read_datasets(folders, base))
    evidence = read_json_artifact(version.run_id, EVIDENCE)
    until = float(evidence.get("until", float("-inf")))
    if config.reference:
        rows = torch.ones(len(merged.keys), dtype=torch.bool)
    elif evidence:
        reserved = set(evidence["keys"])
        is_held_out = torch.tensor([key in reserved for key in merged.keys])
        rows = merged.is_live & (merged.times <= until) & (merged.truthful.isnan() | is_held_out)
    else:
        keys = _list_held_out_keys(read_json_artifact(version.run_id, "evaluation/risks.json"))
        rows = torch.tensor([key in keys for key in merged.keys])
    data = merged.select_rows(rows)
    if len(data.keys) < MIN_ROWS:
        reason = f"{len(data.keys)} rows of the training data of {config.detector} were not trained on"
        raise UsageError(f"{reason}; a comparison needs {MIN_ROWS}. Pass --reference FOLDER, other data of its kind")
    return Reference(data, compute_risk_at(detector, data, torch.arange(len(data.keys))), until)


def _list_held_out_keys(risks: Mapping[str, Any]) -> set[str]:
    return {key for part in risks.values() for key in part}
