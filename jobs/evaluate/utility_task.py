"""The task of utility suites that needs no engine, in a process of its own on the cluster."""

from collections.abc import Mapping, Sequence

from trimtab.data.prompt import Prompt
from trimtab.evaluation.safety.results import Arm
from trimtab.evaluation.utility import text_scoring
from trimtab.evaluation.utility.text_scoring import TextScore
from trimtab.generation_types import Progress
from trimtab.model.base_model import BaseModel, resolve_on_node
from trimtab.model.chat_template import build_renderer
from trimtab.model.frozen_model import FrozenModel
from trimtab.types import Precision


def score_texts(
    tell: Progress,
    base: BaseModel,
    wanted: Mapping[str, tuple[Sequence[Arm], Sequence[Prompt], int]],
    precision: Precision,
    device: str,
) -> dict[str, list[list[TextScore]]]:
    """For each suite's arms, texts and longest text in tokens: the readings of every arm."""
    local = resolve_on_node(base)
    rows = max((len(arm.prefix.vectors) for arms, _, _ in wanted.values() for arm in arms if arm.prefix), default=1)
    renderer = build_renderer(local, rows)
    frozen = FrozenModel(local.load(precision, device), renderer.first_row)
    total = sum(len(arms) * len(texts) for arms, texts, _ in wanted.values())
    before = 0
    found: dict[str, list[list[TextScore]]] = {}
    for suite, (arms, texts, longest) in wanted.items():
        found[suite] = text_scoring.score_texts(
            frozen, renderer, arms, texts, longest, lambda done, _, before=before: tell(before + done, total)
        )
        before += len(arms) * len(texts)
    return found
