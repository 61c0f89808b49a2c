"""Selection of stored answers to label."""

import csv
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.support.live_answers import MODEL, build_answer, build_prompt
from trimtab.detection.live_labels import LabelJournal, LiveLabel, is_reserved
from trimtab.errors import UsageError
from trimtab.generation_types import Signals
from trimtab.serve.live.answer_selection import select_distant
from trimtab.serve.live.ask_command import run_feedback_ask
from trimtab.serve.live.label_commands import run_feedback_import
from trimtab.serve.live.label_config import FeedbackAskConfig, FeedbackImportConfig
from trimtab.serve.live.signal_store import SignalStore, StoreLimits

COUNT = 200


@pytest.fixture
def folder(tmp_path):
    """Answers of two kinds, whose risks rise from 0 to 1."""
    store = SignalStore(tmp_path / "signals", MODEL, StoreLimits())
    generator = torch.Generator().manual_seed(0)
    for number in range(COUNT):
        answer = build_answer(number)
        psi = torch.randn(2, 12, generator=generator) + 20 * (number % 2)
        signals = replace(answer.answer, signals=Signals(psi, answer.answer.signals.history))
        store(replace(answer, answer=signals, risk=number / (COUNT - 1)))
    store.stop()
    return tmp_path / "signals"


def test_selects_uncertain_answers_and_a_random_share(folder):
    rows = run_feedback_ask(FeedbackAskConfig(str(folder), count=20))
    uncertain = [row for row in rows if row["reason"] == "uncertain"]
    random = [row for row in rows if row["reason"] == "random"]
    assert (len(uncertain), len(random)) == (16, 4)
    assert all(is_reserved(row["id"], 0.2) for row in random)
    assert not any(is_reserved(row["id"], 0.2) for row in uncertain)
    assert all(abs(row["risk"] - 0.5) < 0.3 for row in uncertain)
    kinds = [int(row["id"], 16) % 2 for row in uncertain]
    assert 4 < sum(kinds) < 12


def test_answers_are_selected_once_and_labels_are_imported(folder, tmp_path):
    path = tmp_path / "answers.csv"
    first = run_feedback_ask(FeedbackAskConfig(str(folder), count=150, out=str(path)))
    LabelJournal(folder, "test").append_label(LiveLabel(f"{199:032x}", 0, True, "ann", True, 1.0))
    second = run_feedback_ask(FeedbackAskConfig(str(folder), count=150))
    keys = [row["id"] for row in (*first, *second)]
    assert len(keys) == len(set(keys)) >= COUNT - 1
    with pytest.raises(UsageError, match="no answers to label"):
        run_feedback_ask(FeedbackAskConfig(str(folder)))
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(row | {"correct": "yes"} for row in rows)
    assert run_feedback_import(FeedbackImportConfig(str(path), signals=str(folder))) == {"labels": 150, "stored": 150}


def test_prompts_are_selected_separately(folder, tmp_path):
    store = SignalStore(folder, MODEL, StoreLimits())
    for number in range(10):
        store(build_prompt(number))
    store.stop()
    path = tmp_path / "prompts.csv"
    rows = run_feedback_ask(FeedbackAskConfig(str(folder), subject="prompt", out=str(path)))
    assert (len(rows), {row["risk"] for row in rows}) == (10, {0.25})
    assert path.read_text().splitlines()[0] == "id,harmful,model,risk,time,reason"
    with pytest.raises(UsageError, match="no prompts to label"):
        run_feedback_ask(FeedbackAskConfig(str(folder), subject="prompt"))


def test_distant_rows_cover_all_clusters():
    centers = np.repeat(np.eye(5, dtype=np.float32) * 10, 40, axis=0)
    noise = np.random.default_rng(0).normal(size=centers.shape).astype(np.float32)
    chosen = select_distant(centers + noise / 10, 5)
    assert sorted(index // 40 for index in chosen) == [0, 1, 2, 3, 4]
