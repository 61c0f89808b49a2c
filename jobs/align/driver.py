"""Running the Ray Train job of a prefix: progress while it runs, a clean stop on Ctrl-C, its last state when it ends."""

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
from trimtab.errors import JobError
from trimtab.jobs.align.checkpoints import find_newest_stored, open_storage
from trimtab.jobs.align.config import AlignConfig
from trimtab.jobs.align.controller_side import CURVES, MlflowCallback, run_worker
from trimtab.jobs.align.dataset import PreparedDataset
from trimtab.jobs.align.state import TrainState, load_state, should_stop_early
from trimtab.jobs.align.worker import TrainingWork
from trimtab.jobs.runtime.cluster import unwrap_ray_error
from trimtab.jobs.runtime.config import ScaleConfig
from trimtab.jobs.runtime.control_actor import format_actor_name, get_or_create
from trimtab.model.base_model import BaseModel
from trimtab.ray_connection import check_resources, find_missing_resources, get_max_node_cores
from trimtab.tracking import runs
from trimtab.tracking.runs import TrackedRun

POLL_SECONDS = 0.5


class StopSignal:
    """Ctrl-C, for all training runs that share this: once to stop after the step that runs, twice to stop at once."""

    def __init__(self) -> None:
        self.asked = False
        self.at_once = False

    def request_stop(self) -> None:
        """Called for each Ctrl-C; the second is raised as KeyboardInterrupt."""
        if self.asked:
            self.at_once = True
            raise KeyboardInterrupt
        self.asked = True
        print_line("stopping after this step, with a checkpoint; press Ctrl-C again to stop at once")


@dataclass(frozen=True)
class ProgressView:
    """What shows a training run: it is called with what the board says, or with nothing and what the run waits for."""

    show: Callable[[Mapping[str, Any], str | None], None]
    stop: StopSignal = field(default_factory=StopSignal)


@dataclass(frozen=True)
class TrainingResult:
    """The state after the last step, and whether the user stopped it before its end."""

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
    """Train; go on from the newest checkpoint in `folder` where there is one, and start nothing where it is the last one.
    `callbacks` are told of each report; without a `view` there is a bar. Raises JobError and errors of ours.
    """
    storage = open_storage(config, folder)
    kept = find_newest_stored(storage)
    if kept:
        _backfill_metrics(run, kept.state.history)
        if kept.state.step >= config.train.steps or should_stop_early(kept.state, config.train):
            return TrainingResult(kept.state, stopped=False)
    resources, least = _get_worker_resources(config), config.scale.least_workers
    taken = [(least or config.scale.workers) * resources.get(kind, 0) for kind in ("CPU", "GPU")]
    check_resources("training", *taken)
    board = get_or_create(format_actor_name(run.run_id))
    begun = kept.checkpoint if kept else None
    work = ray.put(TrainingWork(config, base, prepared.train, prepared.validation, board, run.run_id, begun))
    trainer = TorchTrainer(
        run_worker,
        train_loop_config={"work": work},
        torch_config=TorchConfig(backend="nccl" if config.scale.gpus else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=(least, config.scale.workers) if least else config.scale.workers,
            use_gpu=bool(config.scale.gpus),
            resources_per_worker=resources,
        ),
        run_config=RunConfig(
            name=storage.name,
            storage_path=storage.path,
            storage_filesystem=storage.system,
            failure_config=FailureConfig(max_failures=config.scale.retries),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            callbacks=[MlflowCallback(run), *callbacks],
        ),
    )
    if view:
        result = _watch_training(trainer, board, view, taken)
    else:
        with ProgressBar("training", config.train.steps) as bar:
            result = _watch_training(trainer, board, ProgressView(partial(_update_bar, bar)), taken)
    if result.checkpoint is None:
        raise JobError("training ended without a checkpoint")
    return TrainingResult(load_state(result.checkpoint), bool((result.metrics or {}).get("stopped")))


def build_learned_prefix(
    config: AlignConfig,
    base: BaseModel,
    prepared: PreparedDataset,
    run: TrackedRun,
    fitted: TrainingResult,
    metrics: Mapping[str, float] | None = None,
) -> Prefix:
    """The vectors with the lowest validation loss, or the last ones where nothing was validated, with their card."""
    state = fitted.state
    card = PrefixCard(
        kind="prefix",
        name=config.name,
        base=base.name,
        fingerprint=base.fingerprint,
        place=config.place,
        rows=config.rows,
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
    )
    return build_prefix(state.best if state.best_step else state.vectors, card)


def _backfill_metrics(run: TrackedRun, history: Sequence[Mapping[str, float]]) -> None:
    """Send the steps of a checkpoint that a driver was killed over, so that the run's curve has no gap."""
    run.flush(patient=True)
    known = {step for step, _ in runs.read_curve(run.run_id, f"{CURVES}loss")}
    run.log_curves([entry for entry in history if int(entry["step"]) not in known], CURVES)


def get_worker_cores(scale: ScaleConfig, parallel: int) -> float:
    """CPU cores for each worker of a training run, where so many runs share the cluster."""
    if scale.cpus:
        return scale.cpus
    room = min(get_max_node_cores(), ray.cluster_resources().get("CPU", 1.0) / parallel)
    return max(1, int(room) // scale.workers)


def _get_worker_resources(config: AlignConfig) -> dict[str, float]:
    return {"CPU": get_worker_cores(config.scale, 1), **({"GPU": config.scale.gpus} if config.scale.gpus else {})}


def _watch_training(trainer: TorchTrainer, board: Any, view: ProgressView, taken: Sequence[float]) -> Any:
    """Run `fit` and show how far it is, or what is waited for where the cluster has less than is `taken`.

    In a thread, because in the main thread Ray Train would take Ctrl-C for itself and throw the last steps away.
    """
    outcome: dict[str, Any] = {}
    # An event, because a `join` that Ctrl-C breaks into takes its thread for dead (Python 3.11).
    ended = threading.Event()

    def target() -> None:
        try:
            outcome["result"] = trainer.fit()
        except BaseException as error:
            outcome["error"] = error
        finally:
            ended.set()

    threading.Thread(target=target, daemon=True).start()
    told = False
    while not ended.is_set():
        try:
            ended.wait(POLL_SECONDS)
            latest = _read_latest(board)
            view.show(latest, None if latest else find_missing_resources(*taken))
        except KeyboardInterrupt:
            view.stop.request_stop()
        if view.stop.at_once:
            raise KeyboardInterrupt
        if view.stop.asked and not told:
            told = True
            board.stop.remote()
    if "error" in outcome:
        raise unwrap_ray_error(outcome["error"]) from outcome["error"]
    return outcome["result"]


def _read_latest(board: Any) -> dict[str, Any]:
    """What the board says; nothing where it is gone, as with its node: how training ends is told by training."""
    try:
        reading: ray.ObjectRef[dict[str, Any]] = board.read.remote()
        return ray.get(reading)
    except RayError:
        return {}


def _update_bar(bar: ProgressBar, latest: Mapping[str, Any], short: str | None) -> None:
    if latest:
        bar.update(int(latest["step"]), note=_format_note(latest))
    elif short:
        bar.update(0, note=f"| waits for nodes: it takes {short}")


def _format_note(latest: Mapping[str, float]) -> str:
    """Loss by class and rate, for the progress line."""
    names = {"harmful": "refuse", "benign_hard": "help (hard)", "benign_easy": "help (easy)"}
    losses = ", ".join(f"{shown} {latest[name]:.2f}" for name, shown in names.items() if name in latest)
    rate = latest["seconds"] / max(1, latest["step"])
    return f"| loss {losses} | {rate:.1f} s/step"
