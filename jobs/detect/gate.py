"""Promotion gate of newly trained detectors.

On validation, a detector must rank answers better than the training-free scores and the current champion.
"""

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
    trained: TrainedDetector,
    rows: DataSplits,
    results: Sequence[DetectorResult],
) -> tuple[bool, str]:
    """Check if a new detector may become champion of its name.

    Training-free scores are compared by their means over all seeds, because the AUROC of a single seed depends on its split.
    The current champion is compared on the same validation answers as the new detector. The champion may have been trained on
    these answers, which can only favor it.

    Args:
        name: name of the detector.
        gain: minimum AUROC gain on validation.
        base: base model.
        data: data set that the detector was trained on.
        trained: new detector, one seed of the first result.
        rows: split of that seed.
        results: results of all heads and scores, the new detector's first.

    Returns:
        Whether the detector passes, and the reason.
    """
    rivals = {r.name: (results[0].validation, r.validation) for r in results if not r.learned}
    try:
        version = registry.find_version(base.name, name)
        champion = registry.load_detector(version, base)
    except NotFoundError:
        pass
    except ArtifactError as error:
        return False, f"cannot compare with the champion: {error}"
    else:
        if (reason := _check_comparable(champion, data)) is not None:
            return False, f"cannot compare with champion version {version.version}: it {reason}"
        rivals[f"champion v{version.version}"] = (trained.validation, _compute_auroc(champion, data, rows))
    rival = min(rivals, key=lambda n: rivals[n][0] - rivals[n][1])
    auroc, rival_auroc = rivals[rival]
    if auroc - rival_auroc <= gain:
        return False, f"AUROC {auroc:.3f} on validation is not above {rival} ({rival_auroc:.3f}) by {gain:.3f}"
    return True, f"AUROC {auroc:.3f} on validation, {auroc - rival_auroc:+.3f} over {rival}; promoted to champion"


def _check_comparable(champion: Detector, data: SignalDataset) -> str | None:
    """Return why a champion cannot score these answers, or None if it can."""
    if missing := set(champion.card.layers) - set(data.meta.layers):
        return f"reads layer {min(missing)}, which was not collected"
    return "was trained under another prefix" if champion.card.prefix_digest != data.meta.prefix_digest else None


def _compute_auroc(champion: Detector, data: SignalDataset, rows: DataSplits) -> float:
    """Compute the champion's AUROC on the validation answers."""
    indices = rows.validation_indices
    return heads.compute_auroc(-compute_risk_at(champion, data, indices), data.truthful[indices])
