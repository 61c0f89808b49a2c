"""Text-scoring task of utility suites, which runs in its own process and needs no engine."""

from collections.abc import Mapping, Sequence

from trimtab.data.prompt import Prompt
from trimtab.evaluation.safety.results import Arm
from trimtab.evaluation.utility import text_scoring
from trimtab.evaluation.utility.text_scoring import TextScore
from trimtab.generation_types import Progress
from trimtab.model.base_model import BaseModel, resolve_on_node
from trimtab.model.chat_template import build_renderer
from trimtab.model.frozen_model import FrozenModel
from trimtab.types import DType


def score_texts(
    progress: Progress,
    base: BaseModel,
    suites: Mapping[str, tuple[Sequence[Arm], Sequence[Prompt], int]],
    precision: DType,
    device: str,
) -> dict[str, list[list[TextScore]]]:
    """Score the texts of suites under their arms.

    Args:
        progress: progress callback.
        base: base model.
        suites: arms, texts, and maximum text length in tokens, by suite.
        precision: data type of the model.
        device: device of the model.

    Returns:
        For each suite, the text scores of every arm.
    """
    local = resolve_on_node(base)
    rows = max((len(arm.prefix.vectors) for arms, _, _ in suites.values() for arm in arms if arm.prefix), default=1)
    renderer = build_renderer(local, rows)
    frozen = FrozenModel(local.load(precision, device), renderer.first_slot)
    total = sum(len(arms) * len(texts) for arms, texts, _ in suites.values())
    before = 0
    scores: dict[str, list[list[TextScore]]] = {}
    for suite, (arms, texts, longest) in suites.items():
        scores[suite] = text_scoring.score_texts(
            frozen, renderer, arms, texts, longest, lambda done, _, before=before: progress(before + done, total)
        )
        before += len(arms) * len(texts)
    return scores
