"""Data set of answers or prompts with signals, as training and evaluation of detectors read it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa  # pyright: ignore[reportMissingTypeStubs]
import torch
from torch import Tensor

from trimtab.detection.live_labels import LIVE_SOURCE, read_labels, select_latest
from trimtab.detection.signal_files import DatasetMetadata, list_parts, read_metadata, read_part
from trimtab.detection.signals import build_window_states
from trimtab.errors import ArtifactError
from trimtab.model.base_model import BaseModel
from trimtab.util.identifiers import compute_key
from trimtab.util.remote_paths import Folder, wrap_storage_errors


@dataclass(frozen=True)
class SampledAnswer:
    """Additional sampled answer to a question.

    Attributes:
        text: text of the answer.
        tokens: number of tokens.
        logp: mean log-probability of the tokens, in nats.
        state: last state [L, d], float16.
    """

    text: str
    tokens: int
    logp: float
    state: Tensor


@dataclass(frozen=True)
class SignalDataset:
    """N answers or prompts with labels and signals.

    Attributes:
        meta: identity of the data set.
        keys: unique keys of the rows.
        questions: questions, or prompts.
        sources: sources of the questions.
        groups: groups of the questions; a split keeps a group on one side.
        answers: texts of the answers, empty for prompts.
        finished: whether each answer is complete, that is, not truncated.
        psi: states of the answers or prompts [N, L, 3d].
        traces: N tensors [m, 3] with the log-probability, entropy and margin of each token; [0, 3] for prompts.
        truthful: labels [N]: 1 for a right answer or a benign prompt, 0 for a made-up answer or a harmful prompt, NaN if
            unlabeled.
        samples: sampled answers of each question; empty if they were not requested.
        p_true: probability with which the model calls each answer true; None if it was not requested.
        digest: digest of the rows.
        windows: mean states of the windows of each prompt [W, L, d]; None for prompts of one window, and for answers.
        unfinished: features of each unfinished answer at every `CHECK_INTERVAL` tokens [K, L, 3d], float16; empty if they were
            not collected.
        labels: labels of each prompt.
        originals: key of the prompt that each row is a rewrite of; None for other rows.
        times: times [N] at which a server stored the rows (seconds since 1970); NaN for collected rows.
        trusted: whether the label of each row is from a rater that the operator trusts [N]; true for collected rows.
        repeats: number of times that each row counts in training [N].
    """

    meta: DatasetMetadata
    keys: list[str]
    questions: list[str]
    sources: list[str]
    groups: list[str]
    answers: list[str]
    finished: list[bool]
    psi: Tensor
    traces: list[Tensor]
    truthful: Tensor
    samples: list[tuple[SampledAnswer, ...]]
    p_true: list[float | None]
    digest: str
    windows: list[Tensor | None]
    unfinished: list[Tensor]
    labels: list[tuple[str, ...]]
    originals: list[str | None]
    times: Tensor
    trusted: Tensor
    repeats: Tensor

    @property
    def is_live(self) -> Tensor:
        """Whether a server stored each row [N]."""
        return ~self.times.isnan()

    @property
    def has_trusted_label(self) -> Tensor:
        """Whether each row [N] has a label of a rater that the operator trusts."""
        return self.trusted & ~self.truthful.isnan()

    def select_later(self, time: float) -> "SignalDataset":
        """Return the stored answers after a time (seconds since 1970)."""
        return self.select_rows(self.is_live & (self.times > time))

    def select_rows(self, rows: Tensor) -> "SignalDataset":
        """Return the data set with a selection of rows, by an index or a mask."""
        chosen = torch.arange(len(self.keys))[rows]
        columns: dict[str, Any] = {}
        for name, column in vars(self).items():
            if isinstance(column, Tensor):
                columns[name] = column[chosen]
            elif isinstance(column, list) and column:
                columns[name] = [column[index] for index in chosen.tolist()]
        return replace(self, **columns)

    def list_labels(self) -> list[str]:
        """Return the names of all labels in alphabetical order."""
        return sorted({label for labels in self.labels for label in labels})

    def select_label(self, label: str) -> "SignalDataset":
        """Return the data set with the rows that have a label as positives, and all others as negatives."""
        return replace(self, truthful=torch.tensor([float(label not in labels) for labels in self.labels]))

    def build_windows(self) -> list[Tensor | None]:
        """Build the features [W, L, 3d] of the windows of each prompt; None for prompts of one window."""
        pairs = zip(self.psi, self.windows, strict=True)
        return [None if window is None else build_window_states(psi, window) for psi, window in pairs]


def sample_columns(samples: Sequence[SampledAnswer]) -> dict[str, Any]:
    """Return the sample columns of a row for `append_part`; nulls if there are no samples."""
    if not samples:
        return {"samples": None, "states": None}
    return {
        "samples": [{"text": s.text, "tokens": s.tokens, "logp": s.logp} for s in samples],
        "states": torch.stack([s.state for s in samples]).flatten().numpy(),
    }


def read_dataset(folder: Folder, base: BaseModel | None = None) -> SignalDataset:
    """Read a complete data set, ordered by key.

    Args:
        folder: folder of the data set.
        base: expected base model; None to skip the check.

    Raises:
        ArtifactError: if the data set is missing, damaged, empty, unreachable, or of another base model than `base`.
    """
    with wrap_storage_errors(folder):
        meta = read_metadata(folder)
        tables = [read_part(part, meta) for part in list_parts(folder)]
    if base is not None and meta.fingerprint != base.fingerprint:
        actual, expected = f"{meta.base} ({meta.fingerprint})", f"{base.name} ({base.fingerprint})"
        raise ArtifactError(f"{folder} holds signals of {actual}, not of {expected}. Collect signals with {base.name}")
    if not tables:
        raise ArtifactError(f"{folder} holds no signals. Run `trimtab collect` to fill it")
    table = _drop_duplicates(pa.concat_tables(tables, promote_options="default").sort_by("key"))
    psi = np.stack(table["psi"].to_numpy()).astype(np.float32)
    correct, trusted = _read_truth(folder, meta, table)
    truth = [float("nan") if value is None else float(value) for value in correct]
    times = table["at"].to_pylist() if "at" in table.column_names else [None] * len(table)
    samples, p_true = table["samples"].to_pylist(), table["p_true"].to_pylist()
    rest = json.dumps([table["key"].to_pylist(), truth, samples, p_true])
    digest = compute_key(psi.tobytes() + rest.encode(), 16)
    return SignalDataset(
        meta,
        table["key"].to_pylist(),
        table["question"].to_pylist(),
        table["source"].to_pylist(),
        table["group"].to_pylist(),
        table["answer"].to_pylist(),
        table["whole"].to_pylist(),
        torch.from_numpy(psi).view(len(psi), len(meta.layers), 3 * meta.width),
        [torch.from_numpy(np.array(values, dtype=np.float32)).view(-1, 3) for values in table["history"].to_numpy()],
        torch.tensor(truth),
        [_samples(*pair, meta) for pair in zip(samples, table["states"].to_numpy(), strict=True)],
        p_true,
        digest,
        [_reshape(values, (-1, len(meta.layers), meta.width)) for values in _column(table, "windows")],
        _list_unfinished(table, meta),
        [tuple(labels if labels is not None else ()) for labels in _column(table, "labels")],
        table["original"].to_pylist() if "original" in table.column_names else [None] * len(table),
        torch.tensor([float("nan") if time is None else time for time in times], dtype=torch.double),
        torch.tensor(trusted),
        torch.ones(len(table), dtype=torch.long),
    )


def _read_truth(folder: Folder, meta: DatasetMetadata, table: Any) -> tuple[list[bool | None], list[bool]]:
    """Return the labels of the rows, and whether each is trusted.

    Labels of answers that a server stored are in a journal next to the data set.
    """
    if json.loads(meta.settings or "{}").get("source") != LIVE_SOURCE:
        return table["truthful"].to_pylist(), [True] * len(table)
    latest = select_latest(read_labels(folder.parent))
    labels = [latest.get(key) for key in table["key"].to_pylist()]
    return [label and label.correct for label in labels], [label is not None and label.trusted for label in labels]


def _list_unfinished(table: Any, meta: DatasetMetadata) -> list[Tensor]:
    if not json.loads(meta.settings or "{}").get("unfinished"):
        return []
    states = [_reshape(values, (-1, len(meta.layers), 3 * meta.width)) for values in _column(table, "unfinished")]
    nothing = torch.empty(0, len(meta.layers), 3 * meta.width, dtype=torch.float16)
    return [nothing if entry is None else entry for entry in states]


def _column(table: Any, name: str) -> list[Any]:
    return table[name].to_numpy() if name in table.column_names else [None] * len(table)


def _reshape(values: Any, shape: tuple[int, ...]) -> Tensor | None:
    return None if values is None else torch.from_numpy(np.array(values)).view(shape)


def _samples(samples: list[dict[str, Any]] | None, states: Any, meta: DatasetMetadata) -> tuple[SampledAnswer, ...]:
    if not samples:
        return ()
    stacked = torch.from_numpy(np.array(states, dtype=np.float16)).view(len(samples), len(meta.layers), meta.width)
    return tuple(SampledAnswer(state=state, **fields) for fields, state in zip(samples, stacked, strict=True))


def _drop_duplicates(table: Any) -> Any:
    """Drop repeated keys of a table sorted by key; two jobs may have written to the same folder."""
    keys = table["key"].to_pylist()
    return table.take([index for index, key in enumerate(keys) if index == 0 or key != keys[index - 1]])
