"""Training loop of a Ray Train worker.

Each worker holds the frozen model, computes its share of every batch and applies the same update to the same state.
"""

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
from trimtab.data.schedule import select_batch, split_by_correction
from trimtab.jobs.align import validation
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
    ReductionTable,
    build_example,
    check_finite,
    class_means,
    fit_objective,
    load_model,
    step_columns,
    values_by_class,
)
from trimtab.jobs.align.system_metrics import get_peak_memory_gib, read_node_metrics
from trimtab.model.base_model import BaseModel, resolve_on_node
from trimtab.model.chat_template import ChatRenderer, build_renderer
from trimtab.model.frozen_model import FrozenModel, TrainingExample, select_worker_share, split_into_micro_batches
from trimtab.model.objective_inputs import ObjectiveScorer, collect_openers, compute_totals, summarize_losses
from trimtab.model.reference_outputs import ReferenceOutputs
from trimtab.objectives import Objective

# Reports whose history a checkpoint holds. Workers can be ahead of the controller, which logs a report after its checkpoint is
# stored; a new driver logs from the newest checkpoint what is missing.
REPORTS = 4


@dataclass(frozen=True)
class TrainingWork:
    """Input of every worker, put into the Ray object store by the driver.

    Attributes:
        config: settings of the job.
        base: base model to train the prefix on.
        train: training rows.
        validation: rows for the validation loss.
        control_actor: handle of the control actor of the run.
        run_id: id of the MLflow run, saved in checkpoints.
        newest: newest checkpoint in the storage of the run, None for a new run.
    """

    config: AlignConfig
    base: BaseModel
    train: list[TrainingRow]
    validation: list[TrainingRow]
    control_actor: Any
    run_id: str | None
    newest: Checkpoint | None = None


def run_worker(work: TrainingWork) -> None:
    """Load the model and train; entry point of a Ray Train worker.

    Raises:
        UsageError: if the output head of the model is not supported, or if `train.init` has no tokens.
    """
    context = train.get_context()
    device = get_device() if work.config.scale.gpus_per_worker else torch.device("cpu")
    loop = build_loop(work, device, context.get_world_rank(), context.get_world_size())
    # If the driver was killed, the storage can hold a newer checkpoint than the one that Ray Train recorded.
    loop.run(find_latest([train.get_checkpoint(), work.newest]) or loop.create_state())


def build_loop(work: TrainingWork, device: torch.device, rank: int, workers: int) -> "TrainingLoop":
    """Load the model, tokenize the rows and build the training loop of a worker.

    Args:
        work: input from the driver.
        device: device of the model.
        rank: rank of the worker.
        workers: number of workers.

    Raises:
        UsageError: if the output head of the model is not supported.
    """
    config, base = work.config, resolve_on_node(work.base)
    renderer = build_renderer(base, config.num_virtual_tokens)
    frozen = FrozenModel(load_model(base, config, device), renderer.first_slot)
    frozen.check_head()
    frozen.enable_prefix_tree()
    objective: Objective = objectives.get_objective(config.objective)(**config.objective_options)
    rows = [build_example(renderer, row, config) for row in work.train]
    held_out = [build_example(renderer, row, config) for row in work.validation][: config.train.validation_rows]
    scorer = fit_objective(
        ObjectiveScorer(
            ReferenceOutputs(frozen, *collect_openers(rows)), objective, sharded=config.scale.parallelism == "fsdp"
        ),
        rows,
    )
    if scorer.sharded:
        scorer.precompute_base_outputs([*rows, *held_out] if "teacher" in objective.needs else rows)
    return TrainingLoop(config, work, scorer, renderer, rows, held_out, rank, workers)


@dataclass(frozen=True)
class StepOutput:
    """Result of a training step, the same on every worker.

    Attributes:
        losses: loss of the batch, in total and by class.
        computing: compute time of the slowest worker, in seconds.
        tokens: number of tokens of the batch.
        memory_gib: peak memory of any worker so far, in GiB.
        stop: whether the user requested a stop.
    """

    losses: dict[str, float]
    computing: float
    tokens: int
    memory_gib: float
    stop: bool


@dataclass
class TrainingLoop:
    """Synchronous training loop; all workers run it in lockstep and hold the same state.

    Attributes:
        config: settings of the job.
        work: input from the driver.
        scorer: model and objective.
        renderer: chat renderer of the base model.
        rows: tokenized training rows.
        held_out: tokenized validation rows.
        rank: rank of this worker.
        workers: number of workers.
    """

    config: AlignConfig
    work: TrainingWork
    scorer: ObjectiveScorer
    renderer: ChatRenderer
    rows: list[TrainingExample]
    held_out: list[TrainingExample]
    rank: int
    workers: int
    _pending: Any = None
    _stop_requested: bool = False
    _reported_step: int = 0

    def __post_init__(self) -> None:
        settings = self.config.train
        self._strata, self._proportions = split_by_correction(
            [(row.label, row.corrected) for row in self.rows], settings.class_proportions, settings.corrected_fraction
        )
        distils = "teacher" in self.scorer.objective.needs
        self.validation_scorer = replace(self.scorer, objective=validation.ValidationLoss(distils))

    def create_state(self) -> TrainState:
        """Create the state of a new run.

        Raises:
            UsageError: if `train.init` has no tokens.
        """
        system = next((row.teacher_system for row in self.work.train), None)
        return create_state(self.scorer.frozen, self.config, self.renderer, self.scorer.objective, system)

    def run(self, state: TrainState) -> None:
        """Train until the last step, an early stop or a stop by the user, and report a final checkpoint.

        Args:
            state: state to start from; it is updated in place.
        """
        settings = self.config.train
        # A checkpoint is reported together with its history.
        self._reported_step = state.step
        while state.step < settings.max_steps:
            if state.anchor is None and state.step == round(self.scorer.objective.switch * settings.max_steps) > 0:
                state.anchor = state.vectors.clone()
            start = time.monotonic()
            output = self.run_step(state)
            elapsed = time.monotonic() - start
            state.seconds += elapsed
            state.tokens += output.tokens
            state.memory_gib = max(state.memory_gib, output.memory_gib)
            state.step += 1
            cost = {"seconds": state.seconds, "tokens": state.tokens, "memory_gib": state.memory_gib}
            entry = {"step": state.step, **cost, "overhead": elapsed - output.computing, **output.losses}
            if settings.validate_every and (state.step % settings.validate_every == 0 or state.step == settings.max_steps):
                entry |= self.validate(state)
            state.history.append(entry)
            last = output.stop or should_stop_early(state, settings) or state.step == settings.max_steps
            self.push_progress(entry)
            if last or state.step % settings.checkpoint_every == 0:
                self.report(state, entry | {"stopped": float(output.stop)})
            if last:
                return

    def run_step(self, state: TrainState) -> StepOutput:
        """Run one optimizer step: compute the gradient of a batch and update the vectors of `state` in place."""
        settings = self.config.train
        indices = select_batch(self._strata, self._proportions, settings.global_batch_size, state.step, settings.seed)
        batch = [self.rows[i] for i in indices]
        micro_batches = split_into_micro_batches(batch, settings.micro_batch_size)
        totals = compute_totals(batch)
        table = ReductionTable(len(micro_batches), **step_columns(state.vectors.numel(), len(state.running)))
        for index, is_padding in self.list_own_micro_batches(micro_batches):
            start = time.monotonic()
            result = self.scorer.compute(state.vectors, micro_batches[index], totals, state.running, state.anchor)
            if is_padding:
                continue
            table.set_values(index, nll=values_by_class(result.losses), rows=values_by_class(result.rows), loss=result.loss)
            table.set_values(index, gradient=result.gradient.flatten(), observed=result.observed)
            table.set_values(index, seconds=time.monotonic() - start, memory=get_peak_memory_gib(self.scorer.frozen.device))
        table.set_values(0, stop=float(self._is_stop_requested()))
        sums = self._reduce(table)
        state.running = self.scorer.objective.track(state.running, sums["observed"].float())
        gradient = sums["gradient"].float().view_as(state.vectors)
        check_finite(sums["loss"], gradient, state.step + 1)
        rate = compute_learning_rate(settings.learning_rate, settings.warmup_ratio, state.step, settings.max_steps)
        update_vectors(state, gradient, rate, settings.max_grad_norm)
        seconds = [
            table.get_column("seconds")[select_worker_share(micro_batches, rank, self.workers)].sum().item()
            for rank in range(self.workers)
        ]
        losses = {"loss": sums["loss"].item(), **class_means(sums)}
        losses |= {"gradient_norm": gradient.norm().item(), "learning_rate": rate}
        tokens = sum(self.scorer.count_tokens(example) for example in batch)
        return StepOutput(losses, max(seconds), tokens, table.get_column("memory").max().item(), bool(sums["stop"] > 0))

    def list_own_micro_batches(self, micro_batches: Sequence[list[TrainingExample]]) -> list[tuple[int, bool]]:
        """Return the micro-batches that this worker computes.

        Workers that share a sharded model must run it equally often. Workers with fewer micro-batches repeat the first one
        as padding.

        Args:
            micro_batches: all micro-batches of the batch.

        Returns:
            Pairs of the index of a micro-batch and whether it is padding, whose result is discarded.
        """
        own = [(index, False) for index in select_worker_share(micro_batches, self.rank, self.workers)]
        if not self.scorer.sharded:
            return own
        largest = max(len(select_worker_share(micro_batches, rank, self.workers)) for rank in range(self.workers))
        return own + [(0, True)] * (largest - len(own))

    def validate(self, state: TrainState) -> dict[str, float]:
        """Compute the loss of each class and the decision on the validation rows.

        Updates the best vectors of `state`, or its count of validations without a better value.

        Returns:
            Metrics; see `summarize_validation`.
        """
        micro_batches = split_into_micro_batches(self.held_out, self.config.train.micro_batch_size)
        table = ReductionTable(len(micro_batches), **validation.COLUMNS)
        for index, is_padding in self.list_own_micro_batches(micro_batches):
            micro_batch = micro_batches[index]
            with torch.no_grad():
                scores = self.validation_scorer.compute_scores(state.vectors, micro_batch, torch.empty(0))
                nll, counts = summarize_losses(scores, micro_batch)
            if is_padding:
                continue
            table.set_values(index, nll=values_by_class(nll), rows=values_by_class(counts), **validation.sum_decisions(scores))
        proportions = self.config.train.class_proportions
        trained = [label for label, share in proportions.items() if share > 0]
        metrics = validation.summarize_validation(self._reduce(table), trained)
        validation.select_vectors(state, metrics, self.config.train.selection)
        return metrics

    def push_progress(self, entry: Mapping[str, float]) -> None:
        """Send the latest metrics to the control actor without waiting for the reply; only rank 0 sends."""
        if self.rank == 0:
            self._pending = self.work.control_actor.push.remote({**entry, "prefix_tree": self.scorer.frozen.packs})

    def report(self, state: TrainState, entry: Mapping[str, float]) -> None:
        """Report the history since the last report and a checkpoint to Ray Train.

        Args:
            state: state to save; its history is cut to the last `REPORTS` reports.
            entry: metrics of the last step.
        """
        history = [past for past in state.history if past["step"] > self._reported_step]
        self._reported_step = state.step
        state.history = state.history[-REPORTS * self.config.train.checkpoint_every :]
        node = {"node": read_node_metrics()}
        if self.rank != 0:
            train.report(node)
            return
        with tempfile.TemporaryDirectory() as folder:
            save_state(state, Path(folder), self.work.run_id)
            metrics = {**entry, **node, "history": history, "prefix_tree": self.scorer.frozen.packs}
            train.report(metrics, checkpoint=Checkpoint.from_directory(folder))

    def _is_stop_requested(self) -> bool:
        if self.rank == 0 and self._pending is not None:
            done, _ = ray.wait([self._pending], timeout=0)
            if done:
                self._stop_requested = self._stop_requested or bool(ray.get(done[0]))
        return self.rank == 0 and self._stop_requested

    def _reduce(self, table: ReductionTable) -> dict[str, Tensor]:
        """Return the sums over all micro-batches of all workers."""
        if self.workers > 1:
            table.all_reduce(self.scorer.frozen.device)
        return table.sum_rows()
