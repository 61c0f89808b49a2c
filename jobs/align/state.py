"""Where the training of a prefix stands: its first vectors, the update of a step, and checkpoints without pickle."""

import json
from dataclasses import dataclass, field
from math import cos, pi
from pathlib import Path

import torch
from ray.train import Checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor

from trimtab.errors import UsageError
from trimtab.jobs.align.config import AlignConfig, TrainConfig
from trimtab.model.chat_template import ChatRenderer
from trimtab.model.frozen_model import FrozenModel
from trimtab.objectives import Objective

STATE, VECTORS = "state.json", "state.safetensors"
NUMBERS = ("step", "best_step", "worse", "seconds", "tokens", "memory_gib", "history")


@dataclass
class TrainState:
    """Where training stands after `step` steps, of so many seconds and of rows of so many tokens. `best` are the vectors of the
    lowest validation loss so far, `memory_gib` the most that any worker held."""

    vectors: Tensor
    moments: dict[str, Tensor]
    best: Tensor
    running: Tensor
    anchor: Tensor | None = None
    step: int = 0
    best_loss: float = float("inf")
    best_step: int = 0
    worse: int = 0
    seconds: float = 0.0
    tokens: int = 0
    memory_gib: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list[dict[str, float]])


def create_state(frozen: FrozenModel, config: AlignConfig, renderer: ChatRenderer, objective: Objective) -> TrainState:
    """State before the first step."""
    vectors = build_initial_vectors(frozen, config, renderer)
    moments = {"first": torch.zeros_like(vectors), "second": torch.zeros_like(vectors)}
    return TrainState(vectors, moments, vectors.clone(), torch.zeros(objective.tracked))


def build_initial_vectors(frozen: FrozenModel, config: AlignConfig, renderer: ChatRenderer) -> Tensor:
    """First vectors, float32 [k, d]: the vocabulary's mean, random rows, or the mean of a text's tokens."""
    table = frozen.embedding.weight.detach().float().cpu()
    generator = torch.Generator().manual_seed(config.train.seed)
    if config.train.init == "vocab-mean":
        mean = table.mean(0, keepdim=True).repeat(config.rows, 1)
        # Equal rows would stay equal for ever.
        spread = table.std(0) * 0.1 * torch.randn(config.rows, table.shape[1], generator=generator)
        return mean + spread * (config.rows > 1)
    if config.train.init == "random-row":
        return table[torch.randint(len(table), (config.rows,), generator=generator)].clone()
    ids = renderer.tokenizer.encode(config.train.init.removeprefix("token:"), add_special_tokens=False)
    if not ids:
        raise UsageError(f"train.init {config.train.init!r} names no tokens")
    return torch.stack([table[ids[i % len(ids)]] for i in range(config.rows)])


def compute_learning_rate(peak: float, warmup: float, step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to zero."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return peak * (step + 1) / rising
    return peak * 0.5 * (1 + cos(pi * (step - rising) / max(1, steps - rising)))


def update_vectors(state: TrainState, gradient: Tensor, rate: float, clip: float) -> None:
    """AdamW without weight decay (betas 0.9 and 0.999, epsilon 1e-8) on a gradient clipped to the norm `clip`."""
    gradient = gradient * min(1.0, clip / max(1e-12, gradient.norm().item()))
    parameter = state.vectors.clone().requires_grad_()
    parameter.grad = gradient
    optimiser = torch.optim.AdamW([parameter], lr=rate, weight_decay=0.0)
    if state.step:
        optimiser.state[parameter] = {
            "step": torch.tensor(float(state.step)),
            "exp_avg": state.moments["first"],
            "exp_avg_sq": state.moments["second"],
        }
    optimiser.step()
    after = optimiser.state[parameter]
    state.moments = {"first": after["exp_avg"], "second": after["exp_avg_sq"]}
    state.vectors = parameter.detach()


def should_stop_early(state: TrainState, settings: TrainConfig) -> bool:
    """Whether validation has not become better for as long as `patience` allows."""
    return bool(settings.patience) and state.worse >= settings.patience


def save_state(state: TrainState, folder: Path, run_id: str | None) -> None:
    """Write a checkpoint: tensors as safetensors, numbers as JSON."""
    tensors = {"vectors": state.vectors, "best": state.best, "running": state.running, **state.moments}
    if state.anchor is not None:
        tensors["anchor"] = state.anchor
    save_file(tensors, folder / VECTORS)
    # JSON has no infinity.
    numbers = {"best_loss": state.best_loss if state.best_step else None, "run_id": run_id}
    numbers |= {name: getattr(state, name) for name in NUMBERS}
    (folder / STATE).write_text(json.dumps(numbers))


def load_state(checkpoint: Checkpoint) -> TrainState:
    """Read a checkpoint back."""
    with checkpoint.as_directory() as folder:
        tensors = load_file(Path(folder) / VECTORS)
        numbers = json.loads((Path(folder) / STATE).read_text())
    return TrainState(
        tensors["vectors"],
        {"first": tensors["first"], "second": tensors["second"]},
        tensors["best"],
        tensors["running"],
        tensors.get("anchor"),
        best_loss=float("inf") if numbers["best_loss"] is None else numbers["best_loss"],
        **{name: numbers[name] for name in NUMBERS},
    )
