"""What each Ray Train worker runs: the frozen model, its share of every batch, and the same update everywhere."""

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from ray import train
from ray.train import Checkpoint
from ray.train.torch import get_device
from torch import Tensor

from trimtab import objectives
from trimtab.data.hard_filter import TrainingRow
from trimtab.data.schedule import select_batch
from trimtab.jobs.align.checkpoints import find_latest
from trimtab.jobs.align.config import AlignConfig
from trimtab.jobs.align.state import (
    TrainState,
    compute_learning_rate,
    create_state,
    save_state,
    should_stop_early,
    update_vectors,
)
from trimtab.jobs.align.step import (
    PER_CLASS,
    ReductionTable,
    build_example,
    class_means,
    fit_objective,
    load_model,
    step_columns,
    values_by_class,
)
from trimtab.jobs.align.system_metrics import get_peak_memory_gib, read_node_metrics
from trimtab.model.base_model import BaseModel, resolve_on_node
from trimtab.model.chat_template import build_renderer
from trimtab.model.frozen_model import FrozenModel, TrainingExample, select_worker_share, split_into_micro_batches
from trimtab.model.objective_inputs import ObjectiveScorer, collect_openers, compute_totals, summarize_losses
from trimtab.objectives import Objective
from trimtab.objectives.likelihood import Likelihood


@dataclass(frozen=True)
class TrainingWork:
    """What the driver hands to every worker."""

    config: AlignConfig
    base: BaseModel
    train: list[TrainingRow]
    validation: list[TrainingRow]
    board: Any
    run_id: str | None
    newest: Checkpoint | None = None


def run_worker(work: TrainingWork) -> None:
    """What a Ray Train worker does from its start to its end."""
    config = work.config
    rank, workers = train.get_context().get_world_rank(), train.get_context().get_world_size()
    device = get_device() if config.scale.gpus else torch.device("cpu")
    base = resolve_on_node(work.base)
    renderer = build_renderer(base, config.rows)
    frozen = FrozenModel(load_model(base, config, device), renderer.first_row)
    frozen.check_head()
    frozen.enable_prefix_tree()
    objective: Objective = objectives.get_objective(config.objective)(**config.objective_options)
    rows = [build_example(renderer, row, config) for row in work.train]
    held_out = [build_example(renderer, row, config) for row in work.validation][: config.train.validation_rows]
    scorer = fit_objective(
        ObjectiveScorer(frozen, objective, *collect_openers(rows), sharded=config.scale.parallel == "shard"), rows
    )
    if scorer.sharded:
        scorer.precompute_base_outputs(rows)
    # After a driver's death there may be a newer one than Ray Train had noted.
    state = find_latest([train.get_checkpoint(), work.newest]) or create_state(frozen, config, renderer, objective)
    TrainingLoop(config, work, scorer, rows, held_out, rank, workers).run(state)


@dataclass(frozen=True)
class StepOutput:
    """What a step gave: the losses of its batch, the seconds that the busiest worker computed, the tokens of the batch's rows,
    the most memory that a worker has held so far, and whether the user asked to stop."""

    losses: dict[str, float]
    computing: float
    tokens: int
    memory_gib: float
    stop: bool


@dataclass
class TrainingLoop:
    """The loop over steps; every worker runs it in step with the others and holds the same state."""

    config: AlignConfig
    work: TrainingWork
    scorer: ObjectiveScorer
    rows: list[TrainingExample]
    held_out: list[TrainingExample]
    rank: int
    workers: int
    _pending: Any = None
    _asked_to_stop: bool = False

    def __post_init__(self) -> None:
        # Validation is the plain loss for every objective, so that their curves compare.
        self.plainly = ObjectiveScorer(self.scorer.frozen, Likelihood())

    def run(self, state: TrainState) -> None:
        """Train to the last step, an early stop, or a stop by the user, with a checkpoint at the end."""
        settings = self.config.train
        # What a checkpoint brings was reported with it.
        state.history.clear()
        while state.step < settings.steps:
            if state.anchor is None and state.step == round(self.scorer.objective.switch * settings.steps) > 0:
                state.anchor = state.vectors.clone()
            began = time.monotonic()
            taken = self.run_step(state)
            spent = time.monotonic() - began
            state.seconds += spent
            state.tokens += taken.tokens
            state.memory_gib = max(state.memory_gib, taken.memory_gib)
            state.step += 1
            cost = {"seconds": state.seconds, "tokens": state.tokens, "memory_gib": state.memory_gib}
            entry = {"step": state.step, **cost, "overhead": spent - taken.computing, **taken.losses}
            if settings.validate_every and (state.step % settings.validate_every == 0 or state.step == settings.steps):
                entry |= self.validate(state)
            state.history.append(entry)
            last = taken.stop or should_stop_early(state, settings) or state.step == settings.steps
            self.push_progress(entry)
            if last or state.step % settings.checkpoint_every == 0:
                self.report(state, entry | {"stopped": float(taken.stop)})
            if last:
                return

    def run_step(self, state: TrainState) -> StepOutput:
        """One optimiser step."""
        settings = self.config.train
        chosen = select_batch([r.label for r in self.rows], settings.mix, settings.batch, state.step, settings.seed)
        batch = [self.rows[i] for i in chosen]
        parts = split_into_micro_batches(batch, settings.micro_batch)
        whole = compute_totals(batch)
        table = ReductionTable(len(parts), **step_columns(state.vectors.numel(), len(state.running)))
        for index, spare in self.list_own_micro_batches(parts):
            began = time.monotonic()
            result = self.scorer.compute(state.vectors, parts[index], whole, state.running, state.anchor)
            if spare:
                continue
            table.set_values(index, nll=values_by_class(result.nll), rows=values_by_class(result.rows), loss=result.loss)
            table.set_values(index, gradient=result.gradient.flatten(), observed=result.observed)
            table.set_values(index, seconds=time.monotonic() - began, memory=get_peak_memory_gib(self.scorer.frozen.device))
        table.set_values(0, stop=float(self._is_stop_requested()))
        sums = self._reduce(table)
        state.running = self.scorer.objective.track(state.running, sums["observed"].float())
        gradient = sums["gradient"].float().view_as(state.vectors)
        rate = compute_learning_rate(settings.learning_rate, settings.warmup, state.step, settings.steps)
        update_vectors(state, gradient, rate, settings.clip)
        seconds = [
            table.get_column("seconds")[select_worker_share(parts, rank, self.workers)].sum().item()
            for rank in range(self.workers)
        ]
        losses = {"loss": sums["loss"].item(), **class_means(sums)}
        tokens = sum(self.scorer.count_tokens(example) for example in batch)
        return StepOutput(losses, max(seconds), tokens, table.get_column("memory").max().item(), bool(sums["stop"] > 0))

    def list_own_micro_batches(self, parts: Sequence[list[TrainingExample]]) -> list[tuple[int, bool]]:
        """Indices of the micro-batches that this worker computes, and whether it does so for nothing: where workers share a
        model, all must run it as often."""
        mine = [(index, False) for index in select_worker_share(parts, self.rank, self.workers)]
        if not self.scorer.sharded:
            return mine
        most = max(len(select_worker_share(parts, rank, self.workers)) for rank in range(self.workers))
        return mine + [(0, True)] * (most - len(mine))

    def validate(self, state: TrainState) -> dict[str, float]:
        """Mean loss per token of each class on held-out rows; remembers the best vectors."""
        parts = split_into_micro_batches(self.held_out, self.config.train.micro_batch)
        table = ReductionTable(len(parts), **PER_CLASS)
        for index, spare in self.list_own_micro_batches(parts):
            with torch.no_grad():
                nll, counts = summarize_losses(
                    self.plainly.compute_scores(state.vectors, parts[index], torch.empty(0)), parts[index]
                )
            if spare:
                continue
            table.set_values(index, nll=values_by_class(nll), rows=values_by_class(counts))
        losses = class_means(self._reduce(table))
        loss = sum(losses.values()) / max(1, len(losses))
        if loss < state.best_loss:
            state.best, state.best_loss, state.best_step, state.worse = state.vectors.clone(), loss, state.step, 0
        else:
            state.worse += 1
        return {f"validation_{name}": value for name, value in losses.items()} | {"validation_loss": loss}

    def push_progress(self, entry: Mapping[str, float]) -> None:
        """Put the latest losses on the board; does not wait."""
        if self.rank == 0:
            self._pending = self.work.board.push.remote(dict(entry))

    def report(self, state: TrainState, entry: Mapping[str, float]) -> None:
        """Hand the losses since the last report and a checkpoint to Ray Train."""
        node = {"node": read_node_metrics()}
        if self.rank != 0:
            train.report(node)
            return
        with tempfile.TemporaryDirectory() as folder:
            save_state(state, Path(folder), self.work.run_id)
            train.report({**entry, **node, "history": list(state.history)}, checkpoint=Checkpoint.from_directory(folder))
        state.history.clear()

    def _is_stop_requested(self) -> bool:
        if self.rank == 0 and self._pending is not None:
            done, _ = ray.wait([self._pending], timeout=0)
            if done:
                self._asked_to_stop = self._asked_to_stop or bool(ray.get(done[0]))
        return self.rank == 0 and self._asked_to_stop

    def _reduce(self, table: ReductionTable) -> dict[str, Tensor]:
        """Sums over all micro-batches of all workers."""
        if self.workers > 1:
            table.all_reduce(self.scorer.frozen.device)
        return table.sum_rows()
