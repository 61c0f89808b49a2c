"""Answers and prompts as a server stores them."""

import json
from pathlib import Path

import torch

from trimtab.detection.live_labels import LIVE_SOURCE, LabelJournal, LiveLabel, format_answer_key, format_prompt_key
from trimtab.detection.signal_files import DatasetMetadata, append_part, begin_dataset
from trimtab.engine.recording import AnswerSignals, PromptSignals, RecordedAnswer, RecordedPrompt
from trimtab.generation_types import Signals
from trimtab.model.base_model import BaseModel
from trimtab.serve.live.signal_store import StoredModel, format_dataset_name
from trimtab.types import Subject

MODEL = StoredModel("tiny", "f" * 16, (1, 2), 4, "fp32")


def build_answer(number: int, prefix_digest: str | None = None, choice: int = 0) -> RecordedAnswer:
    """Return an answer whose states are a multiple of its number."""
    signals = Signals(torch.full((2, 12), number / 8), torch.tensor([[-1.0, 0.5, 0.25]] * 3))
    answer = AnswerSignals(signals, 3, finished=True)
    return RecordedAnswer(f"{number:032x}", choice, "alice", "tiny", prefix_digest, "truth@1", 0.5, answer)


def build_prompt(number: int, prefix_digest: str | None = None) -> RecordedPrompt:
    """Return a prompt of two windows whose states are a multiple of its number."""
    windows = torch.full((2, 2, 4), number / 8)
    signals = PromptSignals(torch.full((2, 12), number / 4), windows, prefix_digest, "guard@1", 0.25)
    return RecordedPrompt(f"{number:032x}", "alice", "tiny", signals)


def get_dataset(folder: Path, prefix_digest: str | None = None, subject: Subject = "answer") -> Path:
    """Return the folder of the data set of a prefix."""
    return folder / format_dataset_name(MODEL.describe_dataset(prefix_digest, subject))


def write_live_dataset(
    folder: Path,
    base: BaseModel,
    layers: tuple[int, int],
    count: int,
    labeled: int,
    *,
    trusted: bool = True,
    start: int = 0,
    subject: Subject = "answer",
) -> Path:
    """Write signals of answers or prompts whose labels show in other components than those of collected data sets.

    The first rows have labels. Each row is an hour later than the one before.

    Returns:
        Folder of the data set, in a folder with the labels.
    """
    settings = json.dumps({"source": LIVE_SOURCE})
    metadata = DatasetMetadata(base.name, base.fingerprint, layers, base.width, "fp32", None, settings, subject=subject)
    dataset = folder / format_dataset_name(metadata)
    begin_dataset(dataset, metadata)
    generator = torch.Generator().manual_seed(start)
    journal = LabelJournal(folder, "test")
    rows = []
    for number in range(start, start + count):
        right = bool(torch.rand(1, generator=generator) < 0.5)
        psi = torch.randn(2, 3 * base.width, generator=generator)
        psi[1, 100:200] += right
        history = torch.randn(4, 3, generator=generator).abs() * torch.tensor([-1.0, 1.0, 1.0])
        request_id, at = f"{number:032x}", 3600.0 * number
        rows.append(
            {
                "key": format_prompt_key(request_id) if subject == "prompt" else format_answer_key(request_id, 0),
                "question": "",
                "source": "alice",
                "group": request_id,
                "answer": "",
                "tokens": 4,
                "whole": True,
                "psi": psi.flatten().half().numpy(),
                "history": history.flatten().half().numpy() if subject == "answer" else [],
                "at": at,
                "model": base.name,
                "risk": 0.5,
            }
        )
        if number < start + labeled:
            journal.append_label(LiveLabel(request_id, 0, right, "ann", trusted, at + 60, subject))
    append_part(dataset, metadata, rows, halved=True)
    return dataset
