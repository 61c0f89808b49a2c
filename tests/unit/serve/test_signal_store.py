"""Writer of live signals: parts, labels, sampling, limits, and losses without delay."""

import os
import time
from dataclasses import replace

import pytest
import torch

from tests.support.live_answers import MODEL, build_answer, get_dataset
from trimtab.detection import signal_files
from trimtab.detection.live_labels import LabelJournal, LiveLabel, read_labels
from trimtab.detection.signal_dataset import read_dataset
from trimtab.engine.metrics import SIGNALS_LOST, SIGNALS_STORED
from trimtab.generation_types import Signals
from trimtab.serve.live import signal_store
from trimtab.serve.live.answer_ids import open_answer_ids
from trimtab.serve.live.signal_store import SignalStore, StoreLimits


def label(number, correct, *, rater="alice", trusted=False, at=1.0):
    return LiveLabel(f"{number:032x}", 0, correct, rater, trusted, at)


def test_stored_answers_and_their_labels_are_a_data_set(tmp_path):
    store = SignalStore(tmp_path, MODEL, StoreLimits())
    for number in range(4):
        store(build_answer(number))
    store(build_answer(9, "d" * 64))
    store.stop()
    journal = LabelJournal(tmp_path, "one")
    journal.append_label(label(1, True))
    journal.append_label(label(3, True))
    LabelJournal(tmp_path, "two").append_label(label(3, False, at=2.0))
    dataset = read_dataset(get_dataset(tmp_path))
    assert dataset.keys == [f"{number:032x}/0" for number in range(4)]
    assert [None if value != value else value for value in dataset.truthful.tolist()] == [None, 1.0, None, 0.0]
    assert torch.equal(dataset.psi[1], torch.full((2, 12), 1 / 8))
    assert dataset.traces[0].tolist() == [[-1.0, 0.5, 0.25]] * 3
    assert (dataset.sources[0], set(dataset.questions), set(dataset.answers)) == ("alice", {""}, {""})
    assert read_dataset(get_dataset(tmp_path, "d" * 64)).meta.prefix_digest == "d" * 64


def test_trusted_raters_outweigh_later_labels_of_others(tmp_path):
    SignalStore(tmp_path, MODEL, StoreLimits()).stop()
    store = SignalStore(tmp_path, MODEL, StoreLimits())
    store(build_answer(1))
    store.stop()
    journal = LabelJournal(tmp_path, "one")
    journal.append_label(label(1, True, rater="expert", trusted=True))
    journal.append_label(label(1, False, at=5.0))
    assert read_dataset(get_dataset(tmp_path)).truthful.tolist() == [1.0]


def test_damaged_lines_of_the_journal_are_skipped(tmp_path):
    LabelJournal(tmp_path, "one").append_label(label(1, True))
    path = tmp_path / "labels" / "one.jsonl"
    path.write_text(path.read_text() + '{"id": 3}\n{"id": "a", "cho')
    assert read_labels(tmp_path) == [label(1, True)]


def test_history_can_be_left_out(tmp_path):
    store = SignalStore(tmp_path, MODEL, StoreLimits(with_history=False))
    store(build_answer(1))
    store.stop()
    assert read_dataset(get_dataset(tmp_path)).traces[0].shape == (0, 3)


def test_large_states_stay_finite(tmp_path):
    store = SignalStore(tmp_path, MODEL, StoreLimits())
    answer = build_answer(1)
    store(replace(answer, answer=replace(answer.answer, signals=Signals(torch.full((2, 12), 1e6), torch.zeros(3, 3)))))
    store.stop()
    assert read_dataset(get_dataset(tmp_path)).psi.isfinite().all()


def test_sampling_depends_on_the_id_only(tmp_path):
    stores = [SignalStore(tmp_path, MODEL, StoreLimits(0.25)) for _ in range(2)]
    ids = [os.urandom(16).hex() for _ in range(2000)]
    sampled = [stores[0].is_sampled(i) for i in ids]
    assert sampled == [stores[1].is_sampled(i) for i in ids]
    assert 0.2 < sum(sampled) / len(ids) < 0.3
    assert not stores[0].is_sampled("")


def test_answers_that_cannot_be_written_are_counted_and_do_not_stop_the_writer(tmp_path, monkeypatch):
    lost, stored = SIGNALS_LOST._value.get(), SIGNALS_STORED._value.get()
    monkeypatch.setattr(signal_store, "PART_ROWS", 1)
    folder = tmp_path / "signals"
    folder.write_text("a file in the place of the folder")
    store = SignalStore(folder, MODEL, StoreLimits())
    store(build_answer(1))
    wait_for(lambda: SIGNALS_LOST._value.get() == lost + 1)
    folder.unlink()
    store(build_answer(2))
    store.stop()
    assert SIGNALS_STORED._value.get() == stored + 1
    assert read_dataset(get_dataset(folder)).keys == [f"{2:032x}/0"]


def test_full_queue_drops_answers_without_waiting(tmp_path, monkeypatch):
    monkeypatch.setattr(signal_store, "MOST_WAITING", 2)
    monkeypatch.setattr(SignalStore, "_run", lambda self, queue: None)
    lost = SIGNALS_LOST._value.get()
    store = SignalStore(tmp_path, MODEL, StoreLimits())
    for number in range(5):
        store(build_answer(number))
    assert SIGNALS_LOST._value.get() == lost + 3


@pytest.mark.parametrize(("limits", "left"), [({"max_bytes": 1}, 0), ({"retention_seconds": 3600.0}, 2), ({}, 3)])
def test_old_parts_and_those_beyond_the_size_are_removed(tmp_path, monkeypatch, limits, left):
    meta = MODEL.describe_dataset(None)
    folder = get_dataset(tmp_path)
    signal_files.begin_dataset(folder, meta)
    for age in (10.0, 100.0, 7200.0):
        signal_files.append_part(folder, meta, [{"key": str(age)}])
        newest = max(folder.glob("part-*"), key=lambda path: path.stat().st_mtime_ns)
        os.utime(newest, (time.time() - age, time.time() - age))
    store = SignalStore(tmp_path, MODEL, StoreLimits(**limits))
    wait_for(lambda: store._last_sweep > 0)
    store.stop()
    assert len(list(folder.glob("part-*"))) == left


def test_ids_prove_the_key_that_sent_the_request(tmp_path):
    ids = open_answer_ids(tmp_path / "signals")
    signed = ids.sign_id("a" * 32, "alice")
    assert len(signed) == 32
    assert ids.is_owner(signed, "alice")
    assert not ids.is_owner(signed, "bob")
    assert not ids.is_owner(signed, None)
    assert open_answer_ids(tmp_path / "signals") == ids
    assert not open_answer_ids(tmp_path / "other").is_owner(signed, "alice")


def wait_for(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
