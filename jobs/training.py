"""What each Ray Train worker runs: the frozen model, its share of every batch, and the same update everywhere."""

import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import cos, pi
from pathlib import Path
from typing import Any

import ray
import torch
import torch.distributed as dist
from ray import train
from ray.train import Checkpoint
from ray.train.torch import get_device
from safetensors.torch import load_file, save_file
from torch import Tensor

from trimtab import base as bases
from trimtab import chat, objectives
from trimtab.base import BaseModel
from trimtab.chat import Renderer
from trimtab.data.filters import Row
from trimtab.data.schedule import batch_rows
from trimtab.errors import UsageError
from trimtab.objectives import Objective
from trimtab.objectives.likelihood import Likelihood
from trimtab.scoring import Scorer, openers, summarise
from trimtab.steering import Example, FrozenModel, micro_batches, sample, share
from trimtab.words import LABELS

from .config import AlignConfig

STATE, VECTORS = "state.json", "state.safetensors"
# Rows whose base states an objective is fitted to, about.
ANCHORS = 128


@dataclass(frozen=True)
class Work:
    """What the driver hands to every worker."""

    config: AlignConfig
    base: BaseModel
    train: list[Row]
    validation: list[Row]
    board: Any
    run_id: str | None


@dataclass
class State:
    """Where training stands after `step` steps. `best` are the vectors of the lowest validation loss so far."""

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
    history: list[dict[str, float]] = field(default_factory=list[dict[str, float]])


def worker(work: Work) -> None:
    """What a Ray Train worker does from its start to its end."""
    config = work.config
    rank, workers = train.get_context().get_world_rank(), train.get_context().get_world_size()
    device = get_device() if config.scale.gpus else torch.device("cpu")
    base = bases.here(work.base)
    renderer = chat.renderer(base, config.rows)
    frozen = FrozenModel(base.load(config.train.precision, device), renderer.first_row)
    frozen.check_head()
    objective: Objective = objectives.get(config.objective)(**config.objective_options)
    rows = [_example(renderer, row, config) for row in work.train]
    held_out = [_example(renderer, row, config) for row in work.validation][: config.train.validation_rows]
    scorer = _fitted(Scorer(frozen, objective, *openers(rows)), rows)
    checkpoint = train.get_checkpoint()
    state = restore(checkpoint) if checkpoint else begin(frozen, config, renderer, objective)
    Loop(config, work, scorer, rows, held_out, rank, workers).run(state)


@dataclass
class Loop:
    """The loop over steps; every worker runs it in step with the others and holds the same state."""

    config: AlignConfig
    work: Work
    scorer: Scorer
    rows: list[Example]
    held_out: list[Example]
    rank: int
    workers: int
    _pending: Any = None
    _asked_to_stop: bool = False

    def __post_init__(self) -> None:
        # Validation is the plain loss for every objective, so that their curves compare.
        self.plainly = Scorer(self.scorer.frozen, Likelihood())

    def run(self, state: State) -> None:
        """Train to the last step, an early stop, or a stop by the user, with a checkpoint at the end."""
        settings = self.config.train
        while state.step < settings.steps:
            if state.anchor is None and state.step == round(self.scorer.objective.switch * settings.steps) > 0:
                state.anchor = state.vectors.clone()
            began = time.monotonic()
            losses, stop = self.step(state)
            state.seconds += time.monotonic() - began
            state.step += 1
            entry = {"step": state.step, "seconds": state.seconds, **losses}
            if settings.validate_every and (state.step % settings.validate_every == 0 or state.step == settings.steps):
                entry |= self.validate(state)
            early = bool(settings.patience) and state.worse >= settings.patience
            state.history.append(entry)
            last = stop or early or state.step == settings.steps
            self.tell(entry)
            if last or state.step % settings.checkpoint_every == 0:
                self.report(state, entry | {"stopped": float(stop), "early": float(early)})
            if last:
                return

    def step(self, state: State) -> tuple[dict[str, float], bool]:
        """One optimiser step; returns the batch's losses, and whether the user asked to stop."""
        settings = self.config.train
        chosen = batch_rows([r.label for r in self.rows], settings.mix, settings.batch, state.step, settings.seed)
        batch = [self.rows[i] for i in chosen]
        parts = micro_batches(batch, settings.micro_batch)
        total = sum(e.weight for e in batch)
        # One line for each micro-batch, filled by the worker that computed it: adding the workers' tables is then exact,
        # and adding the lines in order gives the same sum for any number of workers.
        width, tracked = state.vectors.numel(), len(state.running)
        gathered = torch.zeros(len(parts), width + tracked + 1 + 2 * len(LABELS) + 1, dtype=torch.float64)
        for index in share(parts, self.rank, self.workers):
            result = self.scorer.compute(state.vectors, parts[index], total, state.running, state.anchor)
            per_class = [(result.nll.get(label, 0.0), result.rows.get(label, 0)) for label in LABELS]
            rest = [result.loss, *(value for pair in per_class for value in pair)]
            line = torch.cat([result.gradient.flatten().double(), result.observed.double(), torch.tensor(rest).double()])
            gathered[index, :-1] = line
        gathered[0, -1] = float(self._stop_asked())
        sums = self._add(gathered)
        state.running = self.scorer.objective.track(state.running, sums[width : width + tracked].float())
        gradient = sums[:width].float().view_as(state.vectors)
        update(
            state, gradient, learning_rate(settings.learning_rate, settings.warmup, state.step, settings.steps), settings.clip
        )
        loss, *per_class = sums[width + tracked : -1].tolist()
        losses = {"loss": loss, **_per_class(per_class)}
        return losses, bool(sums[-1] > 0)

    def validate(self, state: State) -> dict[str, float]:
        """Mean loss per token of each class on held-out rows; remembers the best vectors."""
        parts = micro_batches(self.held_out, self.config.train.micro_batch)
        gathered = torch.zeros(len(parts), 2 * len(LABELS), dtype=torch.float64)
        for index in share(parts, self.rank, self.workers):
            with torch.no_grad():
                nll, counts = summarise(self.plainly.scores(state.vectors, parts[index], torch.empty(0)), parts[index])
            for at, label in enumerate(LABELS):
                gathered[index, 2 * at] = nll.get(label, 0.0)
                gathered[index, 2 * at + 1] = counts.get(label, 0)
        losses = _per_class(self._add(gathered).tolist())
        loss = sum(losses.values()) / max(1, len(losses))
        if loss < state.best_loss:
            state.best, state.best_loss, state.best_step, state.worse = state.vectors.clone(), loss, state.step, 0
        else:
            state.worse += 1
        return {f"validation_{name}": value for name, value in losses.items()} | {"validation_loss": loss}

    def tell(self, entry: Mapping[str, float]) -> None:
        """Put the latest losses on the board; does not wait."""
        if self.rank == 0:
            self._pending = self.work.board.push.remote(dict(entry))

    def report(self, state: State, entry: Mapping[str, float]) -> None:
        """Hand the losses since the last report and a checkpoint to Ray Train."""
        if self.rank != 0:
            train.report({})
            return
        with tempfile.TemporaryDirectory() as folder:
            keep(state, Path(folder), self.work.run_id)
            train.report({**entry, "history": list(state.history)}, checkpoint=Checkpoint.from_directory(folder))
        state.history.clear()

    def _stop_asked(self) -> bool:
        if self.rank == 0 and self._pending is not None:
            done, _ = ray.wait([self._pending], timeout=0)
            if done:
                self._asked_to_stop = self._asked_to_stop or bool(ray.get(done[0]))
        return self.rank == 0 and self._asked_to_stop

    def _add(self, gathered: Tensor) -> Tensor:
        """Sum over workers, then over micro-batches in order: float64 [columns]."""
        if self.workers > 1:
            on_device = gathered.to(self.scorer.frozen.device)
            dist.all_reduce(on_device)
            gathered = on_device.cpu()
        total = torch.zeros_like(gathered[0])
        for line in gathered:
            total += line
        return total


def begin(frozen: FrozenModel, config: AlignConfig, renderer: Renderer, objective: Objective) -> State:
    """State before the first step."""
    vectors = initial(frozen, config, renderer)
    moments = {"first": torch.zeros_like(vectors), "second": torch.zeros_like(vectors)}
    return State(vectors, moments, vectors.clone(), torch.zeros(objective.tracked))


def initial(frozen: FrozenModel, config: AlignConfig, renderer: Renderer) -> Tensor:
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
    if config.train.init.startswith("token:"):
        ids = renderer.tokenizer.encode(config.train.init.removeprefix("token:"), add_special_tokens=False)
        if ids:
            return torch.stack([table[ids[i % len(ids)]] for i in range(config.rows)])
    raise UsageError(f"train.init {config.train.init!r} must be vocab-mean, random-row or token:TEXT")


def learning_rate(peak: float, warmup: float, step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to zero."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return peak * (step + 1) / rising
    return peak * 0.5 * (1 + cos(pi * (step - rising) / max(1, steps - rising)))


def update(state: State, gradient: Tensor, rate: float, clip: float) -> None:
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


def keep(state: State, folder: Path, run_id: str | None) -> None:
    """Write a checkpoint: tensors as safetensors, numbers as JSON."""
    tensors = {"vectors": state.vectors, "best": state.best, "running": state.running, **state.moments}
    if state.anchor is not None:
        tensors["anchor"] = state.anchor
    save_file(tensors, folder / VECTORS)
    numbers = {
        "step": state.step,
        "best_loss": state.best_loss if state.best_step else None,
        "best_step": state.best_step,
        "worse": state.worse,
        "seconds": state.seconds,
        "run_id": run_id,
    }
    (folder / STATE).write_text(json.dumps(numbers))


def restore(checkpoint: Checkpoint) -> State:
    """Read a checkpoint back."""
    with checkpoint.as_directory() as folder:
        tensors = load_file(Path(folder) / VECTORS)
        numbers = json.loads((Path(folder) / STATE).read_text())
    best_loss = numbers["best_loss"] if numbers["best_loss"] is not None else float("inf")
    moments = {"first": tensors["first"], "second": tensors["second"]}
    return State(
        tensors["vectors"],
        moments,
        tensors["best"],
        tensors["running"],
        tensors.get("anchor"),
        numbers["step"],
        best_loss,
        numbers["best_step"],
        numbers["worse"],
        numbers["seconds"],
    )


def _example(renderer: Renderer, row: Row, config: AlignConfig) -> Example:
    chosen, *rejected = [
        sample(renderer, row.prompt, answer, config.place, config.rows, config.train.longest)
        for answer in (row.target, row.rejected)
        if answer is not None
    ]
    return Example(chosen, row.prompt.label, 1.0, rejected[0] if rejected else None)


def _fitted(scorer: Scorer, rows: list[Example]) -> Scorer:
    """The scorer with its objective fitted to the base model's states, where it asks for them."""
    if "states" not in scorer.objective.needs:
        return scorer
    anchors = rows[:: max(1, len(rows) // ANCHORS)]
    plain = [scorer.plain(e.chosen) for e in anchors]
    states, odds = torch.stack([p.state for p in plain]), torch.stack([p.odds for p in plain])
    harmful = torch.tensor([e.label == "harmful" for e in anchors], device=states.device)
    return replace(scorer, objective=scorer.objective.fitted(states, odds, harmful))


def _per_class(sums: list[float]) -> dict[str, float]:
    """Mean loss of each class that has rows, from pairs (sum, count)."""
    return {label: sums[2 * at] / sums[2 * at + 1] for at, label in enumerate(LABELS) if sums[2 * at + 1]}
