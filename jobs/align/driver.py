"""Driver of the Ray Train run of a prefix.

It starts the run, shows its progress, stops it cleanly on Ctrl-C and returns its last state.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer

from trimtab.artifacts.card import PrefixCard
from trimtab.artifacts.prefix import Prefix, build_prefix
from trimtab.cli.console import ProgressBar, print_line
from trimtab.errors import InterruptedByUserError, JobError
from trimtab.jobs.align.checkpoints import find_newest_stored, open_storage
from trimtab.jobs.align.config import AlignConfig
from trimtab.jobs.align.controller_side import CURVES, MlflowCallback, run_worker
from trimtab.jobs.align.dataset import PreparedDataset
from trimtab.jobs.align.state import TrainState, load_state, should_stop_early
from trimtab.jobs.align.worker import TrainingWork
from trimtab.jobs.runtime.cluster import POLL_SECONDS, unwrap_ray_error
from trimtab.jobs.runtime.config import ScaleConfig
from trimtab.jobs.runtime.control_actor import format_actor_name, get_or_create_actor
from trimtab.model.base_model import BaseModel
from trimtab.ray_connection import check_resources, find_missing_resources, get_max_node_cores
from trimtab.tracking import runs
from trimtab.tracking.runs import TrackedRun


class StopSignal:
    """Stop request by Ctrl-C, shared by concurrent training runs.

    The first Ctrl-C stops after the current step, the second one stops immediately.

    Attributes:
        stop_requested: whether a stop was requested.
        immediate: whether an immediate stop was requested.
    """

    def __init__(self) -> None:
        self.stop_requested = False
        self.immediate = False

    def request_stop(self) -> None:
        """Handle one Ctrl-C.

        Raises:
            KeyboardInterrupt: on the second call.
        """
        if self.stop_requested:
            self.immediate = True
            raise KeyboardInterrupt
        self.stop_requested = True
        print_line("stopping after this step, with a checkpoint; press Ctrl-C again to stop immediately")


@dataclass(frozen=True)
class ProgressView:
    """Progress display of a training run.

    Attributes:
        show: called with the latest metrics and None, or, before the first step, with no metrics and the missing resources.
        stop: stop request to obey.
    """

    show: Callable[[Mapping[str, Any], str | None], None]
    stop: StopSignal = field(default_factory=StopSignal)


@dataclass(frozen=True)
class TrainingResult:
    """Result of a training run.

    Attributes:
        state: state after the last step.
        stopped: whether the user stopped training before its end.
    """

    state: TrainState
    stopped: bool


def run_training(
    config: AlignConfig,
    base: BaseModel,
    prepared: PreparedDataset,
    run: TrackedRun,
    folder: Path,
    callbacks: Sequence[UserCallback] = (),
    view: ProgressView | None = None,
) -> TrainingResult:
    """Train a prefix with Ray Train.

    Training resumes from the newest checkpoint. If that checkpoint is the last one, no training is started.

    Args:
        config: settings of the job.
        base: base model to train the prefix on.
        prepared: training and validation rows.
        run: MLflow run that the metrics are sent to.
        folder: folder of the run; it holds the checkpoints if `scale.storage_path` is not set.
        callbacks: Ray Train callbacks, called for each report.
        view: progress display; without it a progress bar is shown.

    Raises:
        JobError: if training fails, or if the checkpoints cannot be read.
        TrimtabError: if a worker raises one.
        UsageError: if a local Ray has too few resources, or if `scale.storage_path` cannot be opened.
        KeyboardInterrupt: on the second Ctrl-C.
    """
    storage = open_storage(config, folder)
    stored = find_newest_stored(storage)
    if stored:
        _backfill_metrics(run, stored.state.history)
        if stored.state.step >= config.train.max_steps or should_stop_early(stored.state, config.train):
            return TrainingResult(stored.state, stopped=False)
    resources, least = _get_worker_resources(config), config.scale.min_workers
    required = [(least or config.scale.num_workers) * resources.get(kind, 0) for kind in ("CPU", "GPU")]
    check_resources("training", *required)
    control = get_or_create_actor(format_actor_name(run.run_id))
    checkpoint = stored.checkpoint if stored else None
    work = ray.put(TrainingWork(config, base, prepared.train, prepared.validation, control, run.run_id, checkpoint))
    trainer = TorchTrainer(
        run_worker,
        train_loop_config={"work": work},
        torch_config=TorchConfig(backend="nccl" if config.scale.gpus_per_worker else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=(least, config.scale.num_workers) if least else config.scale.num_workers,
            use_gpu=bool(config.scale.gpus_per_worker),
            resources_per_worker=resources,
        ),
        run_config=RunConfig(
            name=storage.name,
            storage_path=storage.path,
            storage_filesystem=storage.system,
            failure_config=FailureConfig(max_failures=config.scale.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            callbacks=[MlflowCallback(run), *callbacks],
        ),
    )
    if view:
        result = _monitor_training(trainer, control, view, required)
    else:
        with ProgressBar("training", config.train.max_steps) as bar:
            result = _monitor_training(trainer, control, ProgressView(partial(_update_bar, bar)), required)
    if result.checkpoint is None:
        raise JobError("training ended without a checkpoint")
    return TrainingResult(load_state(result.checkpoint), bool((result.metrics or {}).get("stopped")))


def check_completed(training: TrainingResult, steps: int) -> None:
    """Raise InterruptedByUserError if the user stopped training before its end.

    Args:
        training: training result.
        steps: maximum number of steps.
    """
    if training.stopped:
        raise InterruptedByUserError(
            f"stopped after step {training.state.step} of {steps}, with a checkpoint. To resume, run the same command with "
            "--resume"
        )


def build_learned_prefix(
    config: AlignConfig,
    base: BaseModel,
    prepared: PreparedDataset,
    run: TrackedRun,
    training: TrainingResult,
    metrics: Mapping[str, float] | None = None,
) -> Prefix:
    """Build the prefix artifact from a training result.

    Args:
        config: settings of the job.
        base: base model of the prefix.
        prepared: dataset, whose inputs are listed on the card.
        run: MLflow run of the prefix.
        training: training result.
        metrics: evaluation metrics for the card.

    Returns:
        The vectors with the best validation, or the last vectors if there was no validation, with their card.
    """
    state = training.state
    card = PrefixCard(
        kind="prefix",
        name=config.name,
        base=base.name,
        fingerprint=base.fingerprint,
        position=config.position,
        num_virtual_tokens=config.num_virtual_tokens,
        width=base.width,
        digest="",
        method={
            "objective": config.objective,
            "options": config.objective_options,
            "train": asdict(config.train),
            "steps": state.step,
            "best_step": state.best_step or state.step,
            "seconds": state.seconds,
            "tokens": state.tokens,
            "memory_gib": state.memory_gib,
        },
        data=prepared.inputs,
        metrics=dict(metrics or {}),
        run_id=run.run_id,
        condition=prepared.condition.condition if prepared.condition else None,
    )
    return build_prefix(state.best if state.best_step else state.vectors, card)


def _backfill_metrics(run: TrackedRun, history: Sequence[Mapping[str, float]]) -> None:
    """Log the steps of a checkpoint that are missing in MLflow, because the driver was killed before it sent them."""
    run.flush(patient=True)
    logged = {step for step, _ in runs.read_curve(run.run_id, f"{CURVES}loss")}
    run.log_curves([entry for entry in history if int(entry["step"]) not in logged], CURVES)


def get_worker_cores(scale: ScaleConfig, parallel: int) -> float:
    """Return the number of CPU cores for each worker of a training run.

    Args:
        scale: scale settings; `scale.cpus_per_worker` takes precedence if set.
        parallel: number of training runs that share the cluster.
    """
    if scale.cpus_per_worker:
        return scale.cpus_per_worker
    available = min(get_max_node_cores(), ray.cluster_resources().get("CPU", 1.0) / parallel)
    return max(1, int(available) // scale.num_workers)


def _get_worker_resources(config: AlignConfig) -> dict[str, float]:
    return {
        "CPU": get_worker_cores(config.scale, 1),
        **({"GPU": config.scale.gpus_per_worker} if config.scale.gpus_per_worker else {}),
    }


def _monitor_training(trainer: TorchTrainer, control: Any, view: ProgressView, required: Sequence[float]) -> Any:
    """Run `fit` and show its progress, or the missing resources if the cluster has less than `required` (CPUs, GPUs).

    `fit` runs in a thread: in the main thread Ray Train would handle Ctrl-C itself and discard the last steps.
    """
    outcome: dict[str, Any] = {}
    # An event instead of `join`: a `join` that Ctrl-C interrupts marks the thread as finished (Python 3.11).
    ended = threading.Event()

    def target() -> None:
        try:
            outcome["result"] = trainer.fit()
        except BaseException as error:
            outcome["error"] = error
        finally:
            ended.set()

    threading.Thread(target=target, daemon=True).start()
    stop_sent = warned = False
    while not ended.is_set():
        try:
            ended.wait(POLL_SECONDS)
            latest = _read_latest(control)
            if not warned and not latest.get("prefix_tree", True):
                warned = True
                print_line("prefix-tree batching is not available for this base model: a step takes up to twice as long")
            view.show(latest, None if latest else find_missing_resources(*required))
        except KeyboardInterrupt:
            view.stop.request_stop()
        if view.stop.immediate:
            raise KeyboardInterrupt
        if view.stop.stop_requested and not stop_sent:
            stop_sent = True
            control.stop.remote()
    if "error" in outcome:
        raise unwrap_ray_error(outcome["error"]) from outcome["error"]
    return outcome["result"]


def _read_latest(control: Any) -> dict[str, Any]:
    """Return the latest metrics; empty if the control actor is lost, since `fit` itself reports how training ends."""
    try:
        reading: ray.ObjectRef[dict[str, Any]] = control.read.remote()
        return ray.get(reading)
    except RayError:
        return {}


def _update_bar(bar: ProgressBar, latest: Mapping[str, Any], missing: str | None) -> None:
    if latest:
        bar.update(int(latest["step"]), note=_format_note(latest))
    elif missing:
        bar.update(0, note=f"| waits for nodes: needs {missing}")


def _format_note(latest: Mapping[str, float]) -> str:
    """Format the loss by class and the time per step for the progress bar."""
    names = {"harmful": "refuse", "benign_hard": "help (hard)", "benign_easy": "help (easy)"}
    losses = ", ".join(f"{shown} {latest[name]:.2f}" for name, shown in names.items() if name in latest)
    rate = latest["seconds"] / max(1, latest["step"])
    return f"| loss {losses} | {rate:.1f} s/step"
