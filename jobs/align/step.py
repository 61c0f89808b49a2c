"""What a step adds up over its micro-batches and over all workers, the same for any number of workers.

Each micro-batch has a line of float64, filled by the worker that computed it and zero with all others: adding the workers'
tables is then exact, and the lines are added up in their order.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from ray import train
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from trimtab.data.hard_filter import TrainingRow
from trimtab.jobs.align.config import AlignConfig
from trimtab.model.base_model import BaseModel
from trimtab.model.chat_template import ChatRenderer
from trimtab.model.frozen_model import TrainingExample, tokenize_sample
from trimtab.model.layer_transforms import compile_layers, enable_activation_checkpointing, shard_model
from trimtab.model.objective_inputs import ObjectiveScorer
from trimtab.types import LABELS

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# Rows whose base states an objective is fitted to, about.
ANCHORS = 128
# Columns of the sums that give each class its mean loss.
PER_CLASS = {"nll": len(LABELS), "rows": len(LABELS)}


def step_columns(numbers: int, tracked: int) -> dict[str, int]:
    """What a step adds up of each micro-batch, as names and how many float64 each has: of vectors of so many `numbers`, and an
    objective that observes `tracked` figures."""
    single = dict.fromkeys(("loss", "seconds", "memory", "stop"), 1)
    return {"gradient": numbers, "observed": tracked, **single, **PER_CLASS}


def load_model(base: BaseModel, config: AlignConfig, device: torch.device) -> "PreTrainedModel":
    """The frozen model on its device, as the settings ask for it."""
    if config.scale.parallel == "data":
        return _apply_layer_options(base.load(config.train.precision, device), config)
    context = train.get_context()
    turns: list[int] = [0] * context.get_world_size()
    dist.all_gather_object(turns, context.get_local_rank())
    mesh = init_device_mesh(device.type, (context.get_world_size(),))
    model: PreTrainedModel | None = None
    # One after another on each node, as each holds the whole model while it loads.
    for turn in range(max(turns) + 1):
        if turn == context.get_local_rank():
            model = _apply_layer_options(base.load(config.train.precision), config)
            shard_model(model, mesh, device)
        dist.barrier()
    assert model is not None
    return model


def _apply_layer_options(model: "PreTrainedModel", config: AlignConfig) -> "PreTrainedModel":
    if config.train.recompute:
        enable_activation_checkpointing(model)
    if config.train.compile:
        compile_layers(model)
    return model


def build_example(renderer: ChatRenderer, row: TrainingRow, config: AlignConfig) -> TrainingExample:
    """Tokenize a training row: its target and, for preference objectives, its rejected answer."""
    chosen, *rejected = [
        tokenize_sample(renderer, row.prompt, answer, config.place, config.rows, config.train.longest)
        for answer in (row.target, row.rejected)
        if answer is not None
    ]
    weight = config.train.weights.get(row.prompt.label, 1.0)
    return TrainingExample(chosen, row.prompt.label, weight, rejected[0] if rejected else None)


def fit_objective(scorer: ObjectiveScorer, rows: list[TrainingExample]) -> ObjectiveScorer:
    """The scorer with its objective fitted to the base model's states, where it asks for them."""
    if "states" not in scorer.objective.needs:
        return scorer
    anchors = rows[:: max(1, len(rows) // ANCHORS)]
    plain = [scorer.get_base_outputs(e.chosen) for e in anchors]
    states, odds = torch.stack([p.state for p in plain]), torch.stack([p.odds for p in plain])
    harmful = torch.tensor([e.label == "harmful" for e in anchors], device=states.device)
    return replace(scorer, objective=scorer.objective.fitted(states, odds, harmful))


def values_by_class(values: Mapping[str, float]) -> Tensor:
    """float64 [classes], 0 where a class has none."""
    return torch.tensor([values.get(label, 0) for label in LABELS], dtype=torch.float64)


def class_means(sums: Mapping[str, Tensor]) -> dict[str, float]:
    """Mean loss of each class that has rows."""
    pairs = zip(LABELS, sums["nll"].tolist(), sums["rows"].tolist(), strict=True)
    return {label: nll / rows for label, nll, rows in pairs if rows}


class ReductionTable:
    """Lines with named step_columns, each of one or more numbers."""

    def __init__(self, lines: int, **sizes: int) -> None:
        self._sizes = sizes
        self._whole = torch.zeros(lines, sum(sizes.values()), dtype=torch.float64)
        self._columns = self._split_columns(self._whole)

    def set_values(self, line: int, **values: Tensor | float) -> None:
        """Fill columns of a line; each value has as many numbers as its column, or is one for all of them."""
        for name, value in values.items():
            self._columns[name][line] = torch.as_tensor(value)

    def all_reduce(self, device: torch.device) -> None:
        """Add all workers' tables, over the network of `device`."""
        there = self._whole.to(device)
        dist.all_reduce(there)
        self._whole.copy_(there)

    def get_column(self, name: str) -> Tensor:
        """A column, float64 [lines, size]."""
        return self._columns[name]

    def sum_rows(self) -> dict[str, Tensor]:
        """The lines added one after the other, by column: float64 [size]."""
        total = torch.zeros_like(self._whole[0])
        for line in self._whole:
            total += line
        return self._split_columns(total)

    def _split_columns(self, numbers: Tensor) -> dict[str, Tensor]:
        return dict(zip(self._sizes, numbers.split(list(self._sizes.values()), dim=-1), strict=True))
