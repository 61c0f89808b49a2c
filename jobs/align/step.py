"""Model setup and deterministic reduction of one training step over micro-batches and workers.

Each micro-batch has a table row of float64 values, filled by the worker that computed it and zero on all others. Adding the
tables of the workers is therefore exact. The rows are then added in a fixed order, so the sums do not depend on the number of
workers.
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
from trimtab.errors import DivergedError
from trimtab.jobs.align.config import AlignConfig
from trimtab.model.base_model import BaseModel
from trimtab.model.chat_template import ChatRenderer
from trimtab.model.frozen_model import TrainingExample, tokenize_sample
from trimtab.model.layer_transforms import compile_layers, enable_activation_checkpointing, shard_model
from trimtab.model.objective_inputs import ObjectiveScorer
from trimtab.types import LABELS

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# Approximate number of training rows whose base model states an objective is fitted to.
ANCHORS = 128
# Columns for the mean loss of each class.
PER_CLASS = {"nll": len(LABELS), "rows": len(LABELS)}


def step_columns(parameters: int, tracked: int) -> dict[str, int]:
    """Return the columns of the reduction table of a step, as name -> number of float64 values.

    Args:
        parameters: number of elements of the prefix vectors.
        tracked: number of statistics that the objective observes.
    """
    single = dict.fromkeys(("loss", "seconds", "memory", "stop"), 1)
    return {"gradient": parameters, "observed": tracked, **single, **PER_CLASS}


def load_model(base: BaseModel, config: AlignConfig, device: torch.device) -> "PreTrainedModel":
    """Load the frozen model on a device, with the precision and layer options of the settings.

    With `scale.parallelism: fsdp` the weights are sharded over the workers, and every worker must call this function.

    Args:
        base: base model to load.
        config: settings of the job.
        device: device of this worker.
    """
    if config.scale.parallelism == "data":
        return _apply_layer_options(base.load(config.train.dtype, device), config)
    context = train.get_context()
    local_ranks: list[int] = [0] * context.get_world_size()
    dist.all_gather_object(local_ranks, context.get_local_rank())
    mesh = init_device_mesh(device.type, (context.get_world_size(),))
    model: PreTrainedModel | None = None
    # Workers of a node load one after another: each holds the complete model in host memory while it loads.
    for local_rank in range(max(local_ranks) + 1):
        if local_rank == context.get_local_rank():
            model = _apply_layer_options(base.load(config.train.dtype), config)
            shard_model(model, mesh, device)
        dist.barrier()
    assert model is not None
    return model


def _apply_layer_options(model: "PreTrainedModel", config: AlignConfig) -> "PreTrainedModel":
    if config.train.activation_checkpointing:
        enable_activation_checkpointing(model)
    if config.train.compile:
        compile_layers(model)
    return model


def build_example(renderer: ChatRenderer, row: TrainingRow, config: AlignConfig, *, with_slots: bool = True) -> TrainingExample:
    """Tokenize the target of a training row and, if there is one, its rejected answer.

    Args:
        renderer: chat renderer of the base model.
        row: training row.
        config: settings of the job.
        with_slots: whether the ids contain the slot tokens of the prefix.
    """
    slots = config.num_virtual_tokens if with_slots else 0
    longest = min(config.train.max_target_tokens, row.trained_tokens or config.train.max_target_tokens)
    chosen, *rejected = [
        tokenize_sample(renderer, row.prompt, answer, config.position, slots, longest, row.teacher_system)
        for answer in (row.target, row.rejected)
        if answer is not None
    ]
    weight = config.train.class_weights.get(row.prompt.label, 1.0)
    corrected = row.origin not in ("given", "greedy")
    return TrainingExample(chosen, row.prompt.label, weight, rejected[0] if rejected else None, corrected)


def fit_objective(scorer: ObjectiveScorer, rows: list[TrainingExample]) -> ObjectiveScorer:
    """Return the scorer with its objective fitted to base model states; unchanged if the objective needs none.

    Args:
        scorer: scorer whose objective is fitted.
        rows: training rows; about `ANCHORS` of them, evenly spaced, are used.
    """
    if "states" not in scorer.objective.needs:
        return scorer
    anchors = rows[:: max(1, len(rows) // ANCHORS)]
    outputs = [scorer.references.get_base_outputs(e.chosen) for e in anchors]
    states, odds = torch.stack([o.state for o in outputs]), torch.stack([o.odds for o in outputs])
    harmful = torch.tensor([e.label == "harmful" for e in anchors], device=states.device)
    return replace(scorer, objective=scorer.objective.fitted(states, odds, harmful))


def values_by_class(values: Mapping[str, float]) -> Tensor:
    """Return values by class as float64 [classes], 0 for a class without a value."""
    return torch.tensor([values.get(label, 0) for label in LABELS], dtype=torch.float64)


def class_means(sums: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the mean loss of each class that has rows.

    Args:
        sums: sums by column; `nll` [classes] and `rows` [classes] are used.
    """
    entries = zip(LABELS, sums["nll"].tolist(), sums["rows"].tolist(), strict=True)
    return {label: nll / rows for label, nll, rows in entries if rows}


class ReductionTable:
    """Table of float64 values with one row per micro-batch and named columns.

    Args:
        length: number of table rows.
        sizes: number of values of each column.
    """

    def __init__(self, length: int, **sizes: int) -> None:
        self._sizes = sizes
        self._table = torch.zeros(length, sum(sizes.values()), dtype=torch.float64)
        self._columns = self._split_columns(self._table)

    def set_values(self, index: int, **values: Tensor | float) -> None:
        """Set columns of a table row.

        Args:
            index: index of the table row.
            values: value of each column; a tensor [size] or a scalar for the entire column.
        """
        for name, value in values.items():
            self._columns[name][index] = torch.as_tensor(value)

    def all_reduce(self, device: torch.device) -> None:
        """Add the tables of all workers in place.

        Args:
            device: device whose communication backend is used.
        """
        table = self._table.to(device)
        dist.all_reduce(table)
        self._table.copy_(table)

    def get_column(self, name: str) -> Tensor:
        """Return a column, float64 [length, size]."""
        return self._columns[name]

    def sum_rows(self) -> dict[str, Tensor]:
        """Return the sum of each column over the table rows, float64 [size], added in row order."""
        total = torch.zeros_like(self._table[0])
        for row in self._table:
            total += row
        return self._split_columns(total)

    def _split_columns(self, values: Tensor) -> dict[str, Tensor]:
        return dict(zip(self._sizes, values.split(list(self._sizes.values()), dim=-1), strict=True))


def check_finite(loss: Tensor, gradient: Tensor, step: int) -> None:
    """Check the sums of a step before the update, which would make the vectors NaN for good.

    All workers have the same sums, so that all of them end.

    Args:
        loss: loss of the batch.
        gradient: gradient of the loss, [k, d].
        step: number of the step, for the message.

    Raises:
        DivergedError: if the loss or the gradient is NaN or infinite.
    """
    if not loss.isfinite().all() or not gradient.isfinite().all():
        raise DivergedError(
            f"training failed: the loss or its gradient is not finite at step {step}. Lower train.learning_rate or set "
            "train.dtype to fp32"
        )
