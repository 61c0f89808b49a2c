"""Whether a detector becomes champion: on validation it must rank better than what needs no learning and than the champion."""

from collections.abc import Sequence

from trimtab import heads
from trimtab.detection.detector import Detector
from trimtab.detection.training import DataSplits, TrainedDetector
from trimtab.errors import ArtifactError, NotFoundError
from trimtab.evaluation.detection.pooling import DetectorResult
from trimtab.jobs.collect.signal_dataset import SignalDataset
from trimtab.jobs.promote.detector_metrics import compute_risk_at
from trimtab.model.base_model import BaseModel
from trimtab.tracking import registry


def check_gate(
    name: str,
    gain: float,
    base: BaseModel,
    data: SignalDataset,
    made: TrainedDetector,
    rows: DataSplits,
    results: Sequence[DetectorResult],
) -> tuple[bool, str]:
    """Whether the detector `made`, the first of the results, may become champion of its name, and why.

    Training-free scores are compared by their means over all seeds, as any one seed's luck is `made`'s; the present champion on
    the same validation answers as `made`. It may have learned from these very answers, which can only help it.
    """
    rivals = {r.name: (results[0].validation, r.validation) for r in results if not r.learned}
    try:
        version = registry.find_version(base.name, name)
        champion = registry.load_detector(version, base)
    except NotFoundError:
        pass
    except ArtifactError as error:
        return False, f"the champion cannot be compared: {error}"
    else:
        if (why := _unlike(champion, data)) is not None:
            return False, f"champion version {version.version} {why}, so the two cannot be compared"
        rivals[f"champion v{version.version}"] = (made.validation, _auroc(champion, data, rows))
    rival = min(rivals, key=lambda n: rivals[n][0] - rivals[n][1])
    mine, theirs = rivals[rival]
    if mine - theirs <= gain:
        return False, f"AUROC {mine:.3f} on validation is not above {rival} ({theirs:.3f}) by {gain:.3f}"
    return True, f"AUROC {mine:.3f} on validation, {mine - theirs:+.3f} over {rival}; promoted to champion"


def _unlike(champion: Detector, data: SignalDataset) -> str | None:
    """Why a champion cannot be asked about these answers."""
    if missing := set(champion.card.layers) - set(data.meta.layers):
        return f"reads layer {min(missing)}, which was not collected"
    return "was fitted under another prefix" if champion.card.prefix != data.meta.prefix else None


def _auroc(champion: Detector, data: SignalDataset, rows: DataSplits) -> float:
    """The champion's AUROC on the validation answers."""
    at = rows.validation_indices
    return heads.compute_auroc(-compute_risk_at(champion, data, at), data.truthful[at])
