"""Background writer of the signals of live prompts and answers.

Each replica has one. It never delays a response: what it cannot write is dropped and counted.
"""

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from queue import Empty, Queue
from typing import Any

import numpy as np
from torch import Tensor

from trimtab.detection.live_labels import LIVE_SOURCE, format_answer_key, format_prompt_key
from trimtab.detection.signal_files import DatasetMetadata, append_part, begin_dataset
from trimtab.engine.config import EngineConfig
from trimtab.engine.metrics import SIGNALS_LOST, SIGNALS_STORED
from trimtab.engine.recording import RecordedAnswer, RecordedPrompt
from trimtab.errors import UsageError
from trimtab.model.base_model import BaseModel, resolve_dtype
from trimtab.serve.background_queue import BackgroundQueue
from trimtab.serve.config import ServeConfig
from trimtab.types import SUBJECTS, Subject
from trimtab.util.identifiers import compute_key
from trimtab.util.remote_paths import Folder, open_folder

log = logging.getLogger(__name__)

# Rows that wait for the writer, and rows per part.
MOST_WAITING, PART_ROWS = 1000, 256
# Time between two removals of old parts (seconds).
SWEEP_SECONDS = 600.0
STOP_SECONDS = 10.0
DAY = 86_400.0
# Hexadecimal digits of a request id that decide whether it is sampled.
SAMPLED_DIGITS = 8
HALF_MAX = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class StoreLimits:
    """Limits of stored signals.

    Attributes:
        sampling_ratio: share of the requests whose signals are stored, from 0 to 1.
        retention_seconds: age at which parts are removed.
        max_bytes: size above which the oldest parts are removed.
        flush_seconds: time after which a row is written.
        with_history: store the statistics of each token, which some heads read.
        subjects: store prompts, answers or both.
    """

    sampling_ratio: float = 1.0
    retention_seconds: float = 30 * DAY
    max_bytes: int = 10 << 30
    flush_seconds: float = 30.0
    with_history: bool = True
    subjects: frozenset[Subject] = frozenset(SUBJECTS)


@dataclass(frozen=True)
class StoredModel:
    """Model and layers of the signals.

    Attributes:
        base: name of the base model.
        fingerprint: base model fingerprint.
        layers: captured layers.
        width: width d of the base model.
        dtype: data type of the model.
    """

    base: str
    fingerprint: str
    layers: tuple[int, ...]
    width: int
    dtype: str

    def describe_dataset(self, prefix_digest: str | None, subject: Subject = "answer") -> DatasetMetadata:
        """Return the identity of the data set with the prompts or answers under a prefix."""
        return DatasetMetadata(
            self.base,
            self.fingerprint,
            self.layers,
            self.width,
            self.dtype,
            prefix_digest,
            json.dumps({"source": LIVE_SOURCE}),
            subject=subject,
        )


@dataclass(frozen=True)
class StoredRow:
    """Row of a data set that waits for the writer.

    Attributes:
        meta: data set of the row.
        values: row by column name.
    """

    meta: DatasetMetadata
    values: dict[str, Any]


class SignalStore:
    """Sink of signals that writes Parquet parts in a thread; see `trimtab.engine.recording.SignalSink`.

    Args:
        folder: folder of the data sets; one per prefix and subject.
        model: model and layers of the signals.
        limits: sampling, retention and size.
    """

    def __init__(self, folder: Folder, model: StoredModel, limits: StoreLimits) -> None:
        self._folder = folder
        self._model = model
        self._limits = limits
        self._begun: set[Folder] = set()
        self._last_sweep = float("-inf")
        # Last: its thread uses the other attributes.
        self._queue: BackgroundQueue[RecordedAnswer | RecordedPrompt] = BackgroundQueue(
            "signals", MOST_WAITING, self._run, SIGNALS_LOST, STOP_SECONDS
        )

    @property
    def subjects(self) -> frozenset[Subject]:
        """Whether prompts, answers or both are stored."""
        return self._limits.subjects

    def is_sampled(self, request_id: str) -> bool:
        """Return whether the signals of a request are stored; the same for all replicas."""
        drawn = int(request_id[:SAMPLED_DIGITS] or "0", 16) / 16**SAMPLED_DIGITS
        return bool(request_id) and drawn < self._limits.sampling_ratio

    def __call__(self, recorded: RecordedAnswer | RecordedPrompt) -> None:
        """Queue a row without blocking; drop and count it if the queue is full."""
        self._queue.put(recorded)

    def stop(self) -> None:
        """Write the queued rows; give up after STOP_SECONDS."""
        self._queue.stop()

    def _run(self, queue: Queue[RecordedAnswer | RecordedPrompt | None]) -> None:
        waiting: dict[DatasetMetadata, list[dict[str, Any]]] = {}
        oldest, is_open = 0.0, True
        while is_open:
            try:
                recorded = queue.get(timeout=1.0)
                is_open = recorded is not None
                if recorded is not None:
                    oldest = oldest or time.monotonic()
                    is_prompt = isinstance(recorded, RecordedPrompt)
                    row = self._build_prompt_row(recorded) if is_prompt else self._build_answer_row(recorded)
                    waiting.setdefault(row.meta, []).append(row.values)
            except Empty:
                pass
            is_old = bool(oldest) and time.monotonic() - oldest > self._limits.flush_seconds
            for meta in [m for m, rows in waiting.items() if len(rows) >= PART_ROWS or is_old or not is_open]:
                self._write_rows(meta, waiting.pop(meta))
            if not waiting:
                oldest = 0.0
            if time.monotonic() - self._last_sweep > SWEEP_SECONDS:
                self._remove_old_parts()

    def _build_answer_row(self, answer: RecordedAnswer) -> StoredRow:
        signals, history = answer.answer.signals, answer.answer.signals.history
        values = {
            "key": format_answer_key(answer.request_id, answer.choice),
            "tokens": answer.answer.tokens,
            "whole": answer.answer.finished,
            "psi": _halve(signals.psi),
            "history": _halve(history) if self._limits.with_history else [],
            "detector": answer.detector,
            "risk": answer.risk,
        }
        return StoredRow(self._model.describe_dataset(answer.prefix_digest, "answer"), _build_common_columns(answer) | values)

    def _build_prompt_row(self, recorded: RecordedPrompt) -> StoredRow:
        prompt = recorded.prompt
        values = {
            "key": format_prompt_key(recorded.request_id),
            "tokens": 0,
            "whole": True,
            "psi": _halve(prompt.psi),
            "history": [],
            "windows": prompt.windows.flatten().numpy() if len(prompt.windows) else None,
            "detector": prompt.detector,
            "risk": prompt.risk,
        }
        return StoredRow(self._model.describe_dataset(prompt.prefix_digest, "prompt"), _build_common_columns(recorded) | values)

    def _write_rows(self, meta: DatasetMetadata, rows: Sequence[dict[str, Any]]) -> None:
        folder = self._folder / format_dataset_name(meta)
        try:
            if folder not in self._begun:
                begin_dataset(folder, meta)
                self._begun.add(folder)
            append_part(folder, meta, rows, halved=True)
        except Exception as error:
            SIGNALS_LOST.inc(len(rows))
            log.warning("signals of %d %ss lost: %s", len(rows), meta.subject, error)
            return
        SIGNALS_STORED.inc(len(rows))

    def _remove_old_parts(self) -> None:
        """Remove parts beyond the retention time, and the oldest ones beyond the size. Another replica may do the same."""
        self._last_sweep = time.monotonic()
        try:
            entries = [(part, part.stat()) for part in self._folder.glob("*/part-*.parquet")]
            entries.sort(key=lambda entry: entry[1].st_mtime, reverse=True)
            size = 0
            for part, status in entries:
                size += status.st_size
                if size > self._limits.max_bytes or time.time() - status.st_mtime > self._limits.retention_seconds:
                    part.unlink(missing_ok=True)
        except Exception as error:
            log.warning("removing old signals failed: %s", error)


def _build_common_columns(recorded: RecordedAnswer | RecordedPrompt) -> dict[str, Any]:
    names = {"source": recorded.key or "", "group": recorded.request_id, "model": recorded.model}
    return {"question": "", "answer": "", "at": time.time(), **names}


def _halve(values: Tensor) -> "np.ndarray[Any, np.dtype[np.float16]]":
    """Return values in half precision; single states of some models are beyond its range."""
    return values.flatten().clamp(-HALF_MAX, HALF_MAX).numpy().astype(np.float16)


def open_signal_store(config: ServeConfig, base: BaseModel, engine: EngineConfig) -> SignalStore:
    """Open the store that the settings of a server name.

    Args:
        config: settings of the server, with `keep_signals`.
        base: base model.
        engine: settings of the engine, with its layers.

    Raises:
        UsageError: if the engine captures no layers, or the storage is not supported.
        ArtifactError: if remote storage cannot be reached.
        OSError: if the folder cannot be written.
    """
    if not engine.layers:
        raise UsageError("keep_signals needs captured layers, but there is no detector. Name them: --engine.layers '[20, 30]'")
    model = StoredModel(base.name, base.fingerprint, tuple(engine.layers), base.width, resolve_dtype(engine.dtype))
    seconds, size = config.signals_retention_days * DAY, config.signals_max_bytes
    subjects = frozenset(config.signals_subjects)
    limits = StoreLimits(config.signals_sampling_ratio, seconds, size, config.signals_flush_s, config.signals_history, subjects)
    folder = open_folder(config.keep_signals or "")
    # A folder that cannot be written must end the start, not lose every row.
    for subject in subjects:
        begin_dataset(folder / format_dataset_name(meta := model.describe_dataset(None, subject)), meta)
    return SignalStore(folder, model, limits)


def format_dataset_name(meta: DatasetMetadata) -> str:
    """Return the name of the folder of a data set, which depends on subject, model, layers and prefix."""
    identity = json.dumps([meta.fingerprint, meta.layers, meta.width, meta.dtype, meta.prefix_digest])
    kind = "prompts-" if meta.subject == "prompt" else ""
    return f"{kind}{'base' if meta.prefix_digest is None else 'prefix'}-{compute_key(identity, 12)}"
