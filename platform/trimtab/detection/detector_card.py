"""Card of a detector, and its thresholds."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ConfigDict

from trimtab.artifacts.card import CARD_VERSION, STRICT, read_card_as
from trimtab.artifacts.card import FILE as CARD
from trimtab.detection.calibration import BALANCED, FALSE_POSITIVE_RATES
from trimtab.detection.label_heads import MAX_LABELS
from trimtab.errors import ArtifactError, UsageError
from trimtab.types import Subject

# False positive rate of the default threshold for answers.
DEFAULT_RATE = "0.05"
# Maximum number of reference risks.
MOST_REFERENCE = 512
# Fields of the card by their names in version 1.
RENAMED = {"settings": "head_options", "low": "low_log_probability", "prefix": "prefix_digest"}


@dataclass(frozen=True)
class DetectorCard:
    """Card of a detector.

    Attributes:
        name: name of the detector.
        base: name of the base model whose signals the detector reads.
        fingerprint: base model fingerprint.
        layers: layers that the signals come from; 0 is the embeddings.
        width: width of the base model.
        head: registered name of the head.
        head_options: settings of the head.
        low_log_probability: log-probability tau_l below which a token counts as low.
        thresholds: risk threshold by false positive rate. A prompt detector has only the rates that its data supports, and
            `balanced`, the threshold with the highest balanced accuracy.
        digest: SHA-256 of the tensors.
        prefix_digest: digest of the prefix under which the answers were generated, or None.
        method: training method, as in a prefix's card.
        data: input data sets, as in a prefix's card.
        metrics: evaluation metrics.
        run_id: id of the MLflow run.
        subject: subject of the detector: `answer` is the risk that an answer is made up, `prompt` that a prompt is harmful.
        kind: kind of the artifact.
        card_version: version of the card format.
        windows: whether the risk of a prompt is the highest of those of the whole prompt and of its windows.
        stop_thresholds: threshold of the highest risk of an unfinished answer, by the share of right answers above it; empty
            if the detector was trained without signals of unfinished answers.
        label_thresholds: thresholds of each label; empty for a detector with one label. `thresholds` are then those of the
            highest risk of all labels.
        reference_risks: risks of rows that the detector was not trained on, at most `MOST_REFERENCE`; servers compare those of
            live answers with them.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    name: str
    base: str
    fingerprint: str
    layers: list[int]
    width: int
    head: str
    head_options: dict[str, Any]
    low_log_probability: float
    thresholds: dict[str, float]
    digest: str = ""
    prefix_digest: str | None = None
    method: dict[str, Any] = field(default_factory=dict[str, Any])
    data: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    metrics: dict[str, float] = field(default_factory=dict[str, float])
    run_id: str | None = None
    subject: Subject = "answer"
    kind: str = "detector"
    card_version: int = CARD_VERSION
    windows: bool = False
    stop_thresholds: dict[str, float] = field(default_factory=dict[str, float])
    label_thresholds: dict[str, dict[str, float]] = field(default_factory=dict[str, dict[str, float]])
    reference_risks: list[float] = field(default_factory=list[float])


def select_threshold(card: DetectorCard, threshold: float | None = None, false_positive_rate: float | None = None) -> float:
    """Select the risk above which a detector flags.

    Args:
        card: card of the detector.
        threshold: threshold to use instead of those on the card.
        false_positive_rate: rate of a threshold on the card; if None, the balanced one for prompts, and 0.05 for answers.

    Raises:
        UsageError: if the card has no such threshold.
    """
    if threshold is not None:
        return threshold
    default = BALANCED if card.subject == "prompt" else DEFAULT_RATE
    key = default if false_positive_rate is None else f"{false_positive_rate:g}"
    if key not in card.thresholds:
        raise UsageError(f"detector {card.name!r} has no threshold for {key}; it has {', '.join(card.thresholds)}")
    return card.thresholds[key]


def select_stop_threshold(
    card: DetectorCard, threshold: float | None = None, false_positive_rate: float | None = None
) -> float:
    """Select the risk of an unfinished answer above which the answer is stopped.

    Args:
        card: card of a detector of answers.
        threshold: threshold to use instead of those on the card.
        false_positive_rate: share of right answers that are stopped; if None, 0.05.

    Raises:
        UsageError: if the card has no such threshold.
    """
    if threshold is not None:
        return threshold
    key = DEFAULT_RATE if false_positive_rate is None else f"{false_positive_rate:g}"
    if key not in card.stop_thresholds:
        has = (
            f"it has {', '.join(card.stop_thresholds)}" if card.stop_thresholds else "it was trained without unfinished answers"
        )
        advice = "Set a threshold, or train it on signals of trimtab collect --unfinished true"
        raise UsageError(f"detector {card.name!r} has no threshold to stop answers for {key}: {has}. {advice}")
    return card.stop_thresholds[key]


def read_detector_card(folder: Path) -> DetectorCard:
    """Read the card of a detector from its folder.

    Raises:
        ArtifactError: if it is no valid card of a detector.
    """
    card = read_card_as(DetectorCard, folder, "detector", RENAMED)
    rates = set(FALSE_POSITIVE_RATES)
    listed = [card.thresholds, *card.label_thresholds.values()]
    if card.subject == "prompt" and any(thresholds.keys() - rates != {BALANCED} for thresholds in listed):
        raise ArtifactError(f"{folder / CARD}: thresholds must be risks by false positive rates and {BALANCED}")
    if card.subject == "answer" and (card.thresholds.keys() != rates or card.stop_thresholds.keys() - rates):
        names = ", ".join(FALSE_POSITIVE_RATES)
        raise ArtifactError(f"{folder / CARD}: thresholds must be risks by the false positive rates {names}")
    if card.label_thresholds and (card.subject == "answer" or len(card.label_thresholds) > MAX_LABELS):
        raise ArtifactError(f"{folder / CARD}: at most {MAX_LABELS} labels are allowed, and for prompts only")
    if len(card.reference_risks) > MOST_REFERENCE or not all(0 <= risk <= 1 for risk in card.reference_risks):
        raise ArtifactError(f"{folder / CARD}: reference_risks must be at most {MOST_REFERENCE} risks from 0 to 1")
    if not card.layers or min(card.layers) < 0 or len(set(card.layers)) < len(card.layers):
        raise ArtifactError(f"{folder / CARD}: layers must be different layer numbers")
    return card
