"""Task that measures how far the predictions under vectors are from those under the system prompt."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from trimtab import objectives
from trimtab.data.hard_filter import TrainingRow
from trimtab.generation_types import Progress
from trimtab.jobs.align.config import AlignConfig
from trimtab.jobs.align.step import build_example
from trimtab.model.base_model import BaseModel, resolve_on_node
from trimtab.model.chat_template import build_renderer
from trimtab.model.frozen_model import FrozenModel
from trimtab.model.objective_inputs import ObjectiveScorer
from trimtab.model.reference_outputs import TEACHER_ROWS, ReferenceOutputs


def measure_divergence(
    progress: Progress,
    base: BaseModel,
    config: AlignConfig,
    rows: Sequence[TrainingRow],
    arms: Mapping[str, Tensor | None],
    device: str,
) -> dict[str, list[float]]:
    """Measure the mean divergence from the teacher of each row under each arm; runs as a Ray task.

    Args:
        progress: progress callback.
        base: base model.
        config: settings of the trainer.
        rows: rows with answers of the teacher.
        arms: vectors [k, d] by arm; None for the base model without the system prompt.
        device: device of the model.

    Returns:
        Divergences of the rows by arm, in nats per token.
    """
    local = resolve_on_node(base)
    renderer = build_renderer(local, config.num_virtual_tokens)
    frozen = FrozenModel(local.load(config.train.dtype, device), renderer.first_slot)
    frozen.enable_prefix_tree()
    scorer = ObjectiveScorer(ReferenceOutputs(frozen), objectives.get_objective("distil")())
    examples = [build_example(renderer, row, config) for row in rows]
    plain = [build_example(renderer, row, config, with_slots=False) for row in rows]
    result: dict[str, list[float]] = {name: [] for name in arms}
    done, total = 0, len(arms) * len(rows)
    for start in range(0, len(rows), TEACHER_ROWS):
        for name, vectors in arms.items():
            listed = (plain if vectors is None else examples)[start : start + TEACHER_ROWS]
            with torch.no_grad():
                scores = scorer.compute_scores(vectors if vectors is None else vectors.to(device), listed, torch.empty(0))
            result[name] += scores.mean_divergence.tolist()
            done += len(listed)
            progress(done, total)
    return result
