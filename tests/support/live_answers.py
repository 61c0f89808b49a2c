"""Answers as a server stores them."""

from pathlib import Path

import torch

from trimtab.engine.recording import AnswerSignals, RecordedAnswer
from trimtab.generation_types import Signals
from trimtab.serve.live.signal_store import StoredModel, format_dataset_name

MODEL = StoredModel("tiny", "f" * 16, (1, 2), 4, "fp32")


def build_answer(number: int, prefix_digest: str | None = None, choice: int = 0) -> RecordedAnswer:
    """Return an answer whose states are a multiple of its number."""
    signals = Signals(torch.full((2, 12), number / 8), torch.tensor([[-1.0, 0.5, 0.25]] * 3))
    answer = AnswerSignals(signals, 3, finished=True)
    return RecordedAnswer(f"{number:032x}", choice, "alice", "tiny", prefix_digest, "truth@1", 0.5, answer)


def get_dataset(folder: Path, prefix_digest: str | None = None) -> Path:
    """Return the folder of the data set of a prefix."""
    return folder / format_dataset_name(MODEL.describe_dataset(prefix_digest))
