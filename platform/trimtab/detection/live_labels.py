"""Labels of answers and prompts that a server has stored, as a journal next to their signals.

Labels may arrive hours after an answer, on another replica, and more than once. A label is written before it is acknowledged,
and the latest one of an answer or prompt is valid.
"""

import json
import os
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from trimtab.data.prompt import hash_to_fraction
from trimtab.errors import UsageError
from trimtab.types import SUBJECTS, Subject
from trimtab.util.remote_paths import Folder, wrap_storage_errors

# Value of `source` in the settings of data sets that a server wrote.
LIVE_SOURCE = "server"
FOLDER = "labels"
# Share of the live requests that no detector is trained on, and its seed. The seed must never change: a champion was trained
# without the same rows.
RESERVED_FRACTION, RESERVED_SEED = 0.2, 2000
# Artifact of a detector's run with the keys of the reserved answers that had a trusted label.
EVIDENCE = "evaluation/evidence.json"
OWNER_ONLY = 0o600
LabelName = Literal["correct", "harmful"]
LABEL_NAMES: tuple[LabelName, ...] = get_args(LabelName)


@dataclass(frozen=True)
class LiveLabel:
    """Label of one answer, or of the prompt of a request.

    Attributes:
        id: request id of the server.
        choice: index of the answer in the response; 0 for a prompt.
        correct: whether the answer is right, or the prompt harmless.
        rater: name of the rater: the API key, or a person that the key names.
        trusted: whether the API key belongs to a rater that the operator trusts.
        at: time of the label (seconds since 1970).
        subject: whether the label is about the answer or the prompt.
    """

    id: str
    choice: int
    correct: bool
    rater: str
    trusted: bool
    at: float
    subject: Subject = "answer"

    @property
    def key(self) -> str:
        """Key of the answer or prompt in the data set of signals."""
        return format_prompt_key(self.id) if self.subject == "prompt" else format_answer_key(self.id, self.choice)

    @property
    def named_value(self) -> tuple[LabelName, bool]:
        """Name and value of the label as raters send it."""
        return ("harmful", not self.correct) if self.subject == "prompt" else ("correct", self.correct)


def build_label(name: LabelName, request_id: str, choice: int, rater: str, *, value: bool, trusted: bool) -> LiveLabel:
    """Build a label of now from its name and value as raters send it.

    Args:
        name: `correct` for a label of an answer, `harmful` for one of a prompt.
        request_id: request id of the server.
        choice: index of the answer in the response; not used for a prompt.
        rater: name of the rater.
        value: value of the label.
        trusted: whether the operator trusts the rater.
    """
    if name == "harmful":
        return LiveLabel(request_id, 0, not value, rater, trusted, time.time(), "prompt")
    return LiveLabel(request_id, choice, value, rater, trusted, time.time())


def format_answer_key(request_id: str, choice: int) -> str:
    """Return the key of an answer in a data set of signals."""
    return f"{request_id}/{choice}"


def format_prompt_key(request_id: str) -> str:
    """Return the key of a prompt in a data set of signals."""
    return f"{request_id}/prompt"


def is_reserved(request_id: str, fraction: float) -> bool:
    """Return whether the answers to a live request are reserved for calibration and gates."""
    return hash_to_fraction(request_id, RESERVED_SEED) < fraction


def check_reserved_fraction(fraction: float) -> None:
    """Raise UsageError if a reserved share leaves too few answers to train on."""
    if not 0 <= fraction < 0.9:
        raise UsageError(f"reserved_fraction must be at least 0 and below 0.9, not {fraction}")


@dataclass(frozen=True)
class LabelJournal:
    """Journal of labels that this process writes.

    Attributes:
        folder: folder of the server's answers.
        name: name of the process, which no other process has.
    """

    folder: Folder
    name: str

    def append_label(self, label: LiveLabel) -> None:
        """Write a label, which survives a crash of the process or of the machine when this returns.

        Raises:
            OSError: if a local disk is full.
            ArtifactError: if remote storage cannot be reached.
        """
        line = json.dumps(asdict(label)) + "\n"
        folder = self.folder / FOLDER
        if isinstance(folder, Path):
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(folder / f"{self.name}.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, OWNER_ONLY)
            try:
                _write_line(descriptor, line.encode())
            finally:
                os.close(descriptor)
            return
        with wrap_storage_errors(self.folder):
            # Object stores cannot append.
            (folder / f"{self.name}-{uuid.uuid4().hex}.jsonl").write_text(line)


def read_labels(folder: Folder) -> list[LiveLabel]:
    """Read all labels of a folder of answers, in the order of their times; damaged lines are skipped.

    Raises:
        ArtifactError: if remote storage cannot be reached.
    """
    with wrap_storage_errors(folder):
        lines = [line for file in (folder / FOLDER).glob("*.jsonl") for line in file.read_text().splitlines()]
    labels = [label for line in lines if (label := _parse_label(line)) is not None]
    return sorted(labels, key=lambda label: (label.at, label.rater))


def select_latest(labels: list[LiveLabel]) -> Mapping[str, LiveLabel]:
    """Return the valid label of each answer and prompt by its key: the latest one of trusted raters, else the latest one.

    Args:
        labels: labels in the order of their times.
    """
    return {label.key: label for label in sorted(labels, key=lambda label: label.trusted)}


def _parse_label(line: str) -> LiveLabel | None:
    try:
        raw: dict[str, Any] = json.loads(line)
        label = LiveLabel(**raw)
    except (ValueError, TypeError):
        return None
    types: dict[str, Any] = {"id": str, "choice": int, "correct": bool, "rater": str, "trusted": bool, "at": int | float}
    is_valid = label.subject in SUBJECTS and all(isinstance(getattr(label, name), kind) for name, kind in types.items())
    return label if is_valid else None


def _write_line(descriptor: int, line: bytes) -> None:
    """Write a line and flush it to the disk. A part of a line is removed, so that it does not damage the next one."""
    end = os.fstat(descriptor).st_size
    try:
        if os.write(descriptor, line) != len(line):
            raise OSError("the disk is full")
        os.fsync(descriptor)
    except OSError:
        os.ftruncate(descriptor, end)
        raise
