"""The task of utility suites that needs no engine, in a process of its own on the cluster."""

from collections.abc import Mapping, Sequence

from trimtab import base as bases
from trimtab import chat
from trimtab.answers import Progress
from trimtab.base import BaseModel
from trimtab.data.rows import Prompt
from trimtab.evaluate import reading
from trimtab.evaluate.reading import Reading
from trimtab.evaluate.safety import Arm
from trimtab.steering import FrozenModel
from trimtab.words import Precision


def read(
    tell: Progress,
    base: BaseModel,
    wanted: Mapping[str, tuple[Sequence[Arm], Sequence[Prompt], int]],
    precision: Precision,
    device: str,
) -> dict[str, list[list[Reading]]]:
    """For each suite's arms, texts and longest text in tokens: the readings of every arm."""
    local = bases.here(base)
    rows = max((len(arm.prefix.vectors) for arms, _, _ in wanted.values() for arm in arms if arm.prefix), default=1)
    renderer = chat.renderer(local, rows)
    frozen = FrozenModel(local.load(precision, device), renderer.first_row)
    total = sum(len(arms) * len(texts) for arms, texts, _ in wanted.values())
    before = 0
    found: dict[str, list[list[Reading]]] = {}
    for suite, (arms, texts, longest) in wanted.items():
        found[suite] = reading.read(
            frozen, renderer, arms, texts, longest, lambda done, _, before=before: tell(before + done, total)
        )
        before += len(arms) * len(texts)
    return found
