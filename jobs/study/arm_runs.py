"""Training the arms of a study: several at once, each a training run of its own that is gone on with, or read back."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from trimtab.artifacts.card import FILE
from trimtab.artifacts.prefix import Prefix, load_prefix, save_prefix
from trimtab.cli.console import ProgressBar, print_line
from trimtab.errors import InterruptedByUserError, UsageError
from trimtab.evaluation.study_page import TrainingCost
from trimtab.jobs.align.config import AlignConfig
from trimtab.jobs.align.dataset import PreparedDataset, build_run_identity
from trimtab.jobs.align.driver import (
    POLL_SECONDS,
    ProgressView,
    StopSignal,
    build_learned_prefix,
    get_worker_cores,
    run_training,
)
from trimtab.jobs.runtime.run_state import RunRecord, create_or_resume_run, read_run_record
from trimtab.model.base_model import BaseModel
from trimtab.tracking import runs

STOPPED = "stopped with a checkpoint; the same command goes on"


@dataclass(frozen=True)
class ArmRun:
    """One arm with one seed: its settings, its rows, and the study's folder."""

    config: AlignConfig
    prepared: PreparedDataset
    study: Path

    @property
    def key(self) -> str:
        """Its name among all arms and seeds."""
        return f"{self.config.name}#{self.config.train.seed}"

    @property
    def folder(self) -> Path:
        """Keeps how far it came."""
        return self.study / "".join(c if c.isalnum() or c in "#-_." else "-" for c in self.key)

    @property
    def known(self) -> RunRecord | None:
        """Its MLflow run and what it was begun with, once it has begun."""
        return read_run_record(self.folder)

    @property
    def done(self) -> bool:
        """Whether its prefix is there."""
        return self.known is not None and (self.folder / "prefix" / FILE).exists()


@dataclass(frozen=True)
class TrainedArm:
    """One arm with one seed: its prefix, the curve of its validation loss, and what learning it took."""

    prefix: Prefix
    curve: list[tuple[int, float]]
    cost: TrainingCost


@dataclass
class ArmProgress:
    """One bar over the steps of all runs, which says where each of those stands that are trained now."""

    bar: ProgressBar
    runs: int
    _steps: dict[str, int] = field(default_factory=dict[str, int])
    _now: dict[str, str] = field(default_factory=dict[str, str])
    _done: int = 0

    def show(self, arm: ArmRun, latest: Mapping[str, Any], short: str | None) -> None:
        """What `fitting.View` calls for one of them."""
        if latest:
            step = int(latest["step"])
            if arm.key not in self._steps:
                # Nearly all of them are an earlier call's, where it goes on with one.
                self.bar.skip(step)
            self._steps[arm.key] = step
            self._now[arm.key] = f"{arm.key} at {latest['step']:.0f}, loss {latest['loss']:.2f}"
        elif short:
            self._now[arm.key] = f"{arm.key} waits for nodes: it takes {short}"
        self._move()

    def end(self, arm: ArmRun, future: Future[None]) -> None:
        """One of them ended; steps that an early stop left out count as done."""
        self._now.pop(arm.key, None)
        if not future.cancelled() and not future.exception():
            self._done += 1
            self.bar.skip(arm.config.train.steps - self._steps.get(arm.key, 0))
            self._steps[arm.key] = arm.config.train.steps
        self._move()

    def _move(self) -> None:
        note = " | ".join([f"| {self._done} of {self.runs} runs done", *self._now.copy().values()])
        self.bar.update(sum(self._steps.copy().values()), note=note)


def train_arms(planned: Sequence[ArmRun], base: BaseModel, parent: str, parallel: int) -> dict[str, TrainedArm]:
    """Train what is missing, in the order given and `parallel` at once.

    Raises UsageError where settings or data changed, Interrupted on Ctrl-C, and the error of a run that failed; the others
    have stopped with a checkpoint then.
    """
    for arm in planned:
        if arm.known and arm.known.config != _identity(arm, base):
            raise UsageError(
                f"{arm.folder.name} was trained with other settings or data: name the arm otherwise, or remove {arm.folder}"
            )
    if left := [arm for arm in planned if not arm.done]:
        _train_left(left, base, parent, parallel)
    return {arm.key: _read(arm) for arm in planned}


def _train_left(left: Sequence[ArmRun], base: BaseModel, parent: str, parallel: int) -> None:
    stop = StopSignal()
    with ProgressBar("training", sum(arm.config.train.steps for arm in left)) as bar:
        progress, pool = ArmProgress(bar, len(left)), ThreadPoolExecutor(parallel)
        futures: dict[Future[None], ArmRun] = {}
        for arm in left:
            future = pool.submit(_train, arm, base, parent, parallel, ProgressView(partial(progress.show, arm), stop))
            future.add_done_callback(partial(progress.end, arm))
            futures[future] = arm
        try:
            _wait(futures, pool, stop)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    errors = [error for future in futures if not future.cancelled() and (error := future.exception())]
    # Those that were stopped because another failed are not the reason.
    for error in sorted(errors, key=lambda e: isinstance(e, InterruptedByUserError)):
        raise error
    if stop.asked:
        raise InterruptedByUserError(STOPPED)


def _wait(futures: Mapping[Future[None], ArmRun], pool: ThreadPoolExecutor, stop: StopSignal) -> None:
    """Until all have ended; none is begun after Ctrl-C or a failure."""
    while left := [future for future in futures if not future.done()]:
        try:
            over = wait(left, POLL_SECONDS).done
        except KeyboardInterrupt:
            stop.request_stop()
            over = set[Future[None]]()
        if not stop.asked and (failed := [futures[f].key for f in over if f.exception()]):
            print_line(f"{failed[0]} failed; what else is being trained stops with a checkpoint")
            stop.asked = True
        if stop.asked:
            pool.shutdown(wait=False, cancel_futures=True)


def _train(arm: ArmRun, base: BaseModel, parent: str, parallel: int, view: ProgressView) -> None:
    """Train one, or go on with it."""
    config, folder = arm.config, arm.folder
    print_line(f"arm {config.name}, seed {config.train.seed}")
    run = create_or_resume_run(folder, f"{config.name} seed {config.train.seed}", "arm", parent, _identity(arm, base))
    with runs.close_run(run):
        run.log_params({"config": asdict(config), "base_fingerprint": base.fingerprint})
        run.log_inputs(arm.prepared.inputs, "training")
        shared = replace(config, scale=replace(config.scale, cpus=get_worker_cores(config.scale, parallel)))
        fitted = run_training(shared, base, arm.prepared, run, folder, view=view)
        if fitted.stopped:
            raise InterruptedByUserError(STOPPED)
        save_prefix(build_learned_prefix(config, base, arm.prepared, run, fitted), folder / "prefix")
        run.log_artifacts(folder / "prefix", "prefix")


def _read(arm: ArmRun) -> TrainedArm:
    prefix = load_prefix(arm.folder / "prefix")
    curve = runs.read_curve(arm.known.run_id, "train/validation_loss") if arm.known else []
    took = {name: prefix.card.method.get(name) for name in ("seconds", "tokens", "memory_gib")}
    return TrainedArm(prefix, curve, TrainingCost(arm.key, **took))


def _identity(arm: ArmRun, base: BaseModel) -> dict[str, Any]:
    return build_run_identity(arm.config, base, arm.prepared.inputs)
