"""Training state of a prefix: initial vectors, optimizer update, early stopping and checkpoints without pickle."""

import json
from dataclasses import dataclass, field
from math import cos, pi, sqrt
from pathlib import Path

import torch
from ray.train import Checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor

from trimtab.errors import JobError, UsageError
from trimtab.jobs.align.config import AlignConfig, TrainConfig
from trimtab.model.chat_template import ChatRenderer
from trimtab.model.frozen_model import FrozenModel
from trimtab.objectives import Objective

STATE, VECTORS = "state.json", "state.safetensors"
# Decay rates of the moments of AdamW, and the term that keeps its denominator above 0.
BETAS, EPSILON = (0.9, 0.999), 1e-8
# Version of the checkpoint; 0.1.0 wrote none, and selected vectors by the loss alone.
FORMAT = 2
NUMBERS = ("step", "best_step", "worse", "seconds", "tokens", "memory_gib", "history")


@dataclass
class TrainState:
    """State of training after `step` steps.

    Attributes:
        vectors: prefix vectors, float32 [k, d].
        moments: AdamW moments `first` and `second`, each [k, d].
        best: vectors with the best validation so far, [k, d].
        running: statistics that the objective tracks, [tracked].
        anchor: vectors at the switch of the objective, [k, d]; None before it.
        step: number of completed steps.
        best_value: lowest value so far of the measure that selects vectors: the validation loss, or the negative decision.
        best_step: step of the best validation; 0 before the first validation.
        worse: number of validations since the best one.
        seconds: training time in seconds.
        tokens: number of tokens trained on.
        memory_gib: peak memory of any worker, in GiB.
        history: metrics of the last steps, including some reports before the last one.
    """

    vectors: Tensor
    moments: dict[str, Tensor]
    best: Tensor
    running: Tensor
    anchor: Tensor | None = None
    step: int = 0
    best_value: float = float("inf")
    best_step: int = 0
    worse: int = 0
    seconds: float = 0.0
    tokens: int = 0
    memory_gib: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list[dict[str, float]])


def create_state(
    frozen: FrozenModel, config: AlignConfig, renderer: ChatRenderer, objective: Objective, teacher_system: str | None = None
) -> TrainState:
    """Return the state before the first step.

    Raises:
        UsageError: if `train.init` has no tokens.
    """
    vectors = build_initial_vectors(frozen, config, renderer, teacher_system)
    moments = {"first": torch.zeros_like(vectors), "second": torch.zeros_like(vectors)}
    return TrainState(vectors, moments, vectors.clone(), torch.zeros(objective.tracked))


def build_initial_vectors(
    frozen: FrozenModel, config: AlignConfig, renderer: ChatRenderer, teacher_system: str | None = None
) -> Tensor:
    """Return the initial vectors, float32 [k, d].

    `train.init` selects the mean of the embedding table, random rows of it, the token embeddings of a text in order, repeated
    as needed, or those of evenly spaced tokens of the teacher's system prompt.

    Raises:
        UsageError: if `train.init` has no tokens.
    """
    table = frozen.embedding.weight.detach().float().cpu()
    generator = torch.Generator().manual_seed(config.train.seed)
    if config.train.init == "vocab-mean":
        mean = table.mean(0, keepdim=True).repeat(config.num_virtual_tokens, 1)
        # Noise breaks the symmetry: equal rows would get equal gradients and stay equal.
        noise = table.std(0) * 0.1 * torch.randn(config.num_virtual_tokens, table.shape[1], generator=generator)
        return mean + noise * (config.num_virtual_tokens > 1)
    if config.train.init == "random-row":
        return table[torch.randint(len(table), (config.num_virtual_tokens,), generator=generator)].clone()
    takes_system = config.train.init == "teacher"
    text = (teacher_system or "") if takes_system else config.train.init.removeprefix("token:")
    ids = renderer.tokenizer.encode(text, add_special_tokens=False)
    if not ids:
        reason = "needs the system prompt of a teacher, which trimtab distil has" if takes_system else "has no tokens"
        raise UsageError(f"train.init {config.train.init!r} {reason}. Give a text after token:")
    rows = config.num_virtual_tokens
    chosen = [len(ids) * (2 * i + 1) // (2 * rows) if takes_system else i % len(ids) for i in range(rows)]
    return torch.stack([table[ids[index]] for index in chosen])


def compute_learning_rate(peak: float, warmup: float, step: int, steps: int) -> float:
    """Return the learning rate of a step: linear warm-up, then cosine decay to zero.

    Args:
        peak: peak learning rate.
        warmup: fraction of the steps in the warm-up.
        step: index of the step, from 0.
        steps: total number of steps.
    """
    warmup_steps = max(1, round(warmup * steps))
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return peak * 0.5 * (1 + cos(pi * (step - warmup_steps) / max(1, steps - warmup_steps)))


def update_vectors(state: TrainState, gradient: Tensor, rate: float, clip: float) -> None:
    """Apply one AdamW update without weight decay to the state in place.

    It is written out, because the moments are part of the checkpoint, which an optimizer object would own.

    Args:
        state: state whose vectors and moments are updated.
        gradient: gradient of the loss, [k, d].
        rate: learning rate.
        clip: maximum L2 norm of the gradient.
    """
    gradient = gradient * min(1.0, clip / max(1e-12, gradient.norm().item()))
    (beta1, beta2), step = BETAS, state.step + 1
    first = state.moments["first"].lerp(gradient, 1 - beta1)
    second = (state.moments["second"] * beta2).addcmul(gradient, gradient, value=1 - beta2)
    denominator = second.sqrt() / sqrt(1 - beta2**step) + EPSILON
    state.vectors = state.vectors.addcdiv(first, denominator, value=-rate / (1 - beta1**step))
    state.moments = {"first": first, "second": second}


def should_stop_early(state: TrainState, settings: TrainConfig) -> bool:
    """Return whether the validation has not improved for `patience` validations."""
    return bool(settings.early_stopping_patience) and state.worse >= settings.early_stopping_patience


def save_state(state: TrainState, folder: Path, run_id: str | None) -> None:
    """Write a checkpoint: tensors as safetensors, scalars and the history as JSON.

    Args:
        state: state to save.
        folder: existing folder to write to.
        run_id: id of the MLflow run.
    """
    tensors = {"vectors": state.vectors, "best": state.best, "running": state.running, **state.moments}
    if state.anchor is not None:
        tensors["anchor"] = state.anchor
    save_file(tensors, folder / VECTORS)
    # JSON has no infinity.
    numbers = {"format": FORMAT, "best_value": state.best_value if state.best_step else None, "run_id": run_id}
    numbers |= {name: getattr(state, name) for name in NUMBERS}
    (folder / STATE).write_text(json.dumps(numbers))


def load_state(checkpoint: Checkpoint) -> TrainState:
    """Load the state from a checkpoint.

    Raises:
        FileNotFoundError: if a file is missing.
        KeyError, ValueError, SafetensorError: if a file is truncated or invalid.
        JobError: if another version of trimtab wrote the checkpoint in another format.
    """
    with checkpoint.as_directory() as folder:
        tensors = load_file(Path(folder) / VECTORS)
        numbers = json.loads((Path(folder) / STATE).read_text())
    if (version := numbers.get("format", 1)) != FORMAT:
        raise JobError(
            f"checkpoint {checkpoint.path} has format {version}, but this trimtab reads {FORMAT}. Resume the run with the "
            "version of trimtab that started it"
        )
    return TrainState(
        tensors["vectors"],
        {"first": tensors["first"], "second": tensors["second"]},
        tensors["best"],
        tensors["running"],
        tensors.get("anchor"),
        best_value=float("inf") if numbers["best_value"] is None else numbers["best_value"],
        **{name: numbers[name] for name in NUMBERS},
    )
