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

from trimtab import ray_connection
from trimtab.artifacts import prefix as prefixes
from trimtab.artifacts.card import Card
from trimtab.artifacts.prefix import Prefix
from trimtab.cli.console import Bar, say
from trimtab.errors import JobError
from trimtab.jobs.align.checkpoints import newest, stored
from trimtab.jobs.align.config import AlignConfig
from trimtab.jobs.align.controller_side import CURVES, MlflowCallback, worker
from trimtab.jobs.align.dataset import Prepared
from trimtab.jobs.align.state import State, early, restore
from trimtab.jobs.align.worker import Work
from trimtab.jobs.runtime.cluster import cause
from trimtab.jobs.runtime.config import ScaleConfig
from trimtab.jobs.runtime.control_actor import board_name, opened
from trimtab.model.base_model import BaseModel
from trimtab.tracking import runs
from trimtab.tracking.runs import Run

POLL_SECONDS = 0.5


class Stop:
    """Ctrl-C, for all training runs that share this: once to stop after the step that runs, twice to stop at once."""

    def __init__(self) -> None:
        self.asked = False
        self.at_once = False

    def ask(self) -> None:
        """Called for each Ctrl-C; the second is raised as KeyboardInterrupt."""
        if self.asked:
            self.at_once = True
            raise KeyboardInterrupt
        self.asked = True
        say("stopping after this step, with a checkpoint; press Ctrl-C again to stop at once")


@dataclass(frozen=True)
class View:
    """What shows a training run: it is called with what the board says, or with nothing and what the run waits for."""

    show: Callable[[Mapping[str, Any], str | None], None]
    stop: Stop = field(default_factory=Stop)


@dataclass(frozen=True)
class Fitted:
    """The state after the last step, and whether the user stopped it before its end."""

    state: State
    stopped: bool


def fit(
    config: AlignConfig,
    base: BaseModel,
    prepared: Prepared,
    run: Run,
    folder: Path,
    callbacks: Sequence[UserCallback] = (),
    view: View | None = None,
) -> Fitted:
    """Train; go on from the newest checkpoint in `folder` where there is one, and start nothing where it is the last one.
    `callbacks` are told of each report; without a `view` there is a bar. Raises JobError and errors of ours.
    """
    storage = stored(config, folder)
    kept = newest(storage)
    if kept:
        _filled(run, kept.state.history)
        if kept.state.step >= config.train.steps or early(kept.state, config.train):
            return Fitted(kept.state, stopped=False)
    resources, least = _resources(config), config.scale.least_workers
    taken = [(least or config.scale.workers) * resources.get(kind, 0) for kind in ("CPU", "GPU")]
    ray_connection.check("training", *taken)
    board = opened(board_name(run.run_id))
    begun = kept.checkpoint if kept else None
    work = ray.put(Work(config, base, prepared.train, prepared.validation, board, run.run_id, begun))
    trainer = TorchTrainer(
        worker,
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
        result = _watch(trainer, board, view, taken)
    else:
        with Bar("training", config.train.steps) as bar:
            result = _watch(trainer, board, View(partial(_move, bar)), taken)
    if result.checkpoint is None:
        raise JobError("training ended without a checkpoint")
    return Fitted(restore(result.checkpoint), bool((result.metrics or {}).get("stopped")))


def learned(
    config: AlignConfig,
    base: BaseModel,
    prepared: Prepared,
    run: Run,
    fitted: Fitted,
    metrics: Mapping[str, float] | None = None,
) -> Prefix:
    """The vectors with the lowest validation loss, or the last ones where nothing was validated, with their card."""
    state = fitted.state
    card = Card(
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
    return prefixes.make(state.best if state.best_step else state.vectors, card)


def _filled(run: Run, history: Sequence[Mapping[str, float]]) -> None:
    """Send the steps of a checkpoint that a driver was killed over, so that the run's curve has no gap."""
    run.flush(patient=True)
    known = {step for step, _ in runs.curve(run.run_id, f"{CURVES}loss")}
    run.curves([entry for entry in history if int(entry["step"]) not in known], CURVES)


def cores(scale: ScaleConfig, parallel: int) -> float:
    """CPU cores for each worker of a training run, where so many runs share the cluster."""
    if scale.cpus:
        return scale.cpus
    room = min(ray_connection.cores(), ray.cluster_resources().get("CPU", 1.0) / parallel)
    return max(1, int(room) // scale.workers)


def _resources(config: AlignConfig) -> dict[str, float]:
    return {"CPU": cores(config.scale, 1), **({"GPU": config.scale.gpus} if config.scale.gpus else {})}


def _watch(trainer: TorchTrainer, board: Any, view: View, taken: Sequence[float]) -> Any:
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
            latest = _latest(board)
            view.show(latest, None if latest else ray_connection.lacking(*taken))
        except KeyboardInterrupt:
            view.stop.ask()
        if view.stop.at_once:
            raise KeyboardInterrupt
        if view.stop.asked and not told:
            told = True
            board.stop.remote()
    if "error" in outcome:
        raise cause(outcome["error"]) from outcome["error"]
    return outcome["result"]


def _latest(board: Any) -> dict[str, Any]:
    """What the board says; nothing where it is gone, as with its node: how training ends is told by training."""
    try:
        reading: ray.ObjectRef[dict[str, Any]] = board.read.remote()
        return ray.get(reading)
    except RayError:
        return {}


def _move(bar: Bar, latest: Mapping[str, Any], short: str | None) -> None:
    if latest:
        bar.update(int(latest["step"]), note=_note(latest))
    elif short:
        bar.update(0, note=f"| waits for nodes: it takes {short}")


def _note(latest: Mapping[str, float]) -> str:
    """Loss by class and rate, for the progress line."""
    names = {"harmful": "refuse", "benign_hard": "help (hard)", "benign_easy": "help (easy)"}
    losses = ", ".join(f"{shown} {latest[name]:.2f}" for name, shown in names.items() if name in latest)
    rate = latest["seconds"] / max(1, latest["step"])
    return f"| loss {losses} | {rate:.1f} s/step"
