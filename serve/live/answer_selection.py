"""Selection of stored answers that are worth a label: uncertain and different ones, and a random share for the gate."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trimtab.detection.live_labels import is_reserved
from trimtab.detection.signal_files import list_parts, read_metadata, read_part, read_rows
from trimtab.util.remote_paths import Folder

# Uncertain answers per answer that is selected among them for its difference from the others.
POOL = 5
COLUMNS = ["key", "group", "model", "risk", "at"]


@dataclass(frozen=True)
class StoredAnswer:
    """Stored answer without its signals.

    Attributes:
        key: key of the answer, which consists of request id and choice.
        group: request id.
        model: model that generated the answer.
        risk: risk by the detector of the server; None without one.
        at: time of the answer (seconds since 1970).
    """

    key: str
    group: str
    model: str | None
    risk: float | None
    at: float


@dataclass(frozen=True)
class SelectedAnswer:
    """Answer to label.

    Attributes:
        answer: the answer.
        reason: `random` for the share that calibrates detectors and decides gates, `uncertain` for training.
    """

    answer: StoredAnswer
    reason: str


def read_answers(dataset: Folder) -> list[StoredAnswer]:
    """Read the answers of a data set, without their signals."""
    return list({row["key"]: StoredAnswer(**row) for row in read_rows(dataset, COLUMNS)}.values())


def read_states(dataset: Folder, keys: Sequence[str]) -> "np.ndarray[Any, np.dtype[np.float32]]":
    """Read the last states [n, d] of answers at the highest captured layer."""
    meta = read_metadata(dataset)
    states: dict[str, Any] = {}
    wanted = set(keys)
    for part in list_parts(dataset):
        table = read_part(part, meta, ["key", "psi"])
        for key, psi in zip(table["key"].to_pylist(), table["psi"].to_numpy(), strict=True):
            if key in wanted:
                states[key] = psi.reshape(len(meta.layers), 3, meta.width)[-1, 0].copy()
    return np.stack([states[key] for key in keys]).astype(np.float32)


def select_answers(
    answers: Sequence[StoredAnswer], dataset: Folder, count: int, reserved_fraction: float, seed: int
) -> list[SelectedAnswer]:
    """Select answers of a data set to label.

    A share of `reserved_fraction` is drawn at random from the answers that no detector is trained on. The others are the most
    uncertain ones for the detector of the server, and among these those whose states differ most from each other.

    Args:
        answers: unlabeled answers.
        dataset: data set of the answers.
        count: maximum number of answers.
        reserved_fraction: share of the requests that is reserved for calibration and gate.
        seed: seed of the random share.

    Returns:
        Selected answers, the random ones first.
    """
    generator = np.random.default_rng(seed)
    reserved = [answer for answer in answers if is_reserved(answer.group, reserved_fraction)]
    others = [answer for answer in answers if not is_reserved(answer.group, reserved_fraction)]
    drawn = min(len(reserved), max(round(count * reserved_fraction), count - len(others)))
    random = [reserved[index] for index in generator.permutation(len(reserved))[:drawn].tolist()]
    left = min(count - len(random), len(others))
    # Without a detector, all answers are equally uncertain; the order of ties must not be that of time.
    others = [others[index] for index in generator.permutation(len(others)).tolist()]
    others = sorted(others, key=_compute_certainty)
    pool = others[: POOL * left]
    chosen = select_distant(read_states(dataset, [answer.key for answer in pool]), left) if left else []
    selected = [SelectedAnswer(answer, "random") for answer in random]
    return selected + [SelectedAnswer(pool[index], "uncertain") for index in chosen]


def select_distant(states: "np.ndarray[Any, np.dtype[np.float32]]", count: int) -> list[int]:
    """Select rows that are far from each other, beginning with the first one (greedy k-center; Gonzalez 1985).

    Args:
        states: states [n, d].
        count: number of rows, at most n.

    Returns:
        Indices of the rows, in the order of their selection.
    """
    scaled = (states - states.mean(0)) / (states.std(0) + 1e-6)
    chosen = [0]
    distances = np.linalg.norm(scaled - scaled[0], axis=1)
    while len(chosen) < count:
        chosen.append(int(distances.argmax()))
        distances = np.minimum(distances, np.linalg.norm(scaled - scaled[chosen[-1]], axis=1))
    return chosen


def _compute_certainty(answer: StoredAnswer) -> float:
    return 0.0 if answer.risk is None else abs(answer.risk - 0.5)
