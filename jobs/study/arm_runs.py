"""Training runs of a study's arms.

Several arms train in parallel. Each arm and seed has its own training run, which is resumed if it was interrupted and read
back if it is done.
"""

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
from trimtab.evaluation.study_page import SelectedStep, TrainingCost
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
from trimtab.jobs.runtime.run_state import RunRecord, check_run_version, create_or_resume_run, read_run_record
from trimtab.model.base_model import BaseModel
from trimtab.tracking import runs
from trimtab.util.identifiers import sanitize_name

STOPPED = "stopped with a checkpoint. Run the same command to resume"


@dataclass(frozen=True)
class ArmRun:
    """Training run of one arm with one seed.

    Attributes:
        config: settings of the arm, including the seed.
        prepared: rows and prompts of the arm.
        study: folder of the study.
    """

    config: AlignConfig
    prepared: PreparedDataset
    study: Path

    @property
    def key(self) -> str:
        """Unique name `ARM#SEED` within the study."""
        return f"{self.config.name}#{self.config.train.seed}"

    @property
    def folder(self) -> Path:
        """Folder of the checkpoints, the run record and the trained prefix."""
        return self.study / sanitize_name(self.key, "#-_.")

    @property
    def record(self) -> RunRecord | None:
        """Record of the MLflow run and its configuration; None if the run has not started."""
        return read_run_record(self.folder)

    @property
    def is_done(self) -> bool:
        """Whether the trained prefix has been saved."""
        return self.record is not None and (self.folder / "prefix" / FILE).exists()


@dataclass(frozen=True)
class TrainedArm:
    """Result of training one arm with one seed.

    Attributes:
        prefix: trained prefix.
        curve: validation loss as (step, loss).
        cost: time, tokens and memory of the training.
        selected: validation at the selected step.
    """

    prefix: Prefix
    curve: list[tuple[int, float]]
    cost: TrainingCost
    selected: SelectedStep


@dataclass
class ArmProgress:
    """Progress bar over the steps of all runs, with the state of the running ones.

    Attributes:
        bar: progress bar that counts training steps.
        runs: number of runs.
    """

    bar: ProgressBar
    runs: int
    _steps: dict[str, int] = field(default_factory=dict[str, int])
    _states: dict[str, str] = field(default_factory=dict[str, str])
    _done: int = 0

    def show(self, arm: ArmRun, latest: Mapping[str, Any], short: str | None) -> None:
        """Show the progress of one run; the callback of its `ProgressView`.

        Args:
            arm: run that reports.
            latest: last reported values with `step` and `loss`; empty before the first step.
            short: resources that the run waits for, None if it does not wait.
        """
        if latest:
            step = int(latest["step"])
            if arm.key not in self._steps:
                # When a run is resumed, an earlier call did nearly all of these steps.
                self.bar.skip(step)
            self._steps[arm.key] = step
            self._states[arm.key] = f"{arm.key} at {latest['step']:.0f}, loss {latest['loss']:.2f}"
        elif short:
            self._states[arm.key] = f"{arm.key} waits for nodes: needs {short}"
        self._update_bar()

    def end(self, arm: ArmRun, future: Future[None]) -> None:
        """Record the end of a run and count the steps that an early stop skipped as done.

        Args:
            arm: run that ended.
            future: its completed future.
        """
        self._states.pop(arm.key, None)
        if not future.cancelled() and not future.exception():
            self._done += 1
            self.bar.skip(arm.config.train.max_steps - self._steps.get(arm.key, 0))
            self._steps[arm.key] = arm.config.train.max_steps
        self._update_bar()

    def _update_bar(self) -> None:
        note = " | ".join([f"| {self._done} of {self.runs} runs done", *self._states.copy().values()])
        self.bar.update(sum(self._steps.copy().values()), note=note)


def train_arms(arms: Sequence[ArmRun], base: BaseModel, parent: str, parallel: int) -> dict[str, TrainedArm]:
    """Train the arms that are not done and return all of them.

    A failed run stops the other runs with a checkpoint; its own error is raised.

    Args:
        arms: runs in the order in which they start.
        base: base model.
        parent: id of the study's MLflow run.
        parallel: number of runs that train at the same time.

    Returns:
        Trained arms by key.

    Raises:
        UsageError: if settings or data of a started run changed.
        InterruptedByUserError: on Ctrl-C.
        TrimtabError: if a run failed.
    """
    for arm in arms:
        if arm.record:
            check_run_version(arm.record, arm.folder)
        if arm.record and arm.record.config != _identity(arm, base):
            raise UsageError(
                f"{arm.folder.name} was trained with other settings or data: rename the arm, or remove {arm.folder}"
            )
    if pending := [arm for arm in arms if not arm.is_done]:
        _train_pending(pending, base, parent, parallel)
    return {arm.key: _read_trained_arm(arm) for arm in arms}


def _train_pending(pending: Sequence[ArmRun], base: BaseModel, parent: str, parallel: int) -> None:
    stop = StopSignal()
    with ProgressBar("training", sum(arm.config.train.max_steps for arm in pending)) as bar:
        progress, pool = ArmProgress(bar, len(pending)), ThreadPoolExecutor(parallel)
        futures: dict[Future[None], ArmRun] = {}
        for arm in pending:
            future = pool.submit(_train_arm, arm, base, parent, parallel, ProgressView(partial(progress.show, arm), stop))
            future.add_done_callback(partial(progress.end, arm))
            futures[future] = arm
        try:
            _wait_for_all(futures, pool, stop)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    errors = [error for future in futures if not future.cancelled() and (error := future.exception())]
    # A failure takes precedence over the interruptions that it caused in the other runs.
    for error in sorted(errors, key=lambda e: isinstance(e, InterruptedByUserError)):
        raise error
    if stop.stop_requested:
        raise InterruptedByUserError(STOPPED)


def _wait_for_all(futures: Mapping[Future[None], ArmRun], pool: ThreadPoolExecutor, stop: StopSignal) -> None:
    """Wait until all runs have ended; start none after Ctrl-C or a failure."""
    while pending := [future for future in futures if not future.done()]:
        try:
            finished = wait(pending, POLL_SECONDS).done
        except KeyboardInterrupt:
            stop.request_stop()
            finished = set[Future[None]]()
        if not stop.stop_requested and (failed := [futures[f].key for f in finished if f.exception()]):
            print_line(f"{failed[0]} failed; the other training runs stop with a checkpoint")
            stop.stop_requested = True
        if stop.stop_requested:
            pool.shutdown(wait=False, cancel_futures=True)


def _train_arm(arm: ArmRun, base: BaseModel, parent: str, parallel: int, view: ProgressView) -> None:
    """Start or resume the training of one arm."""
    config, folder = arm.config, arm.folder
    print_line(f"arm {config.name}, seed {config.train.seed}")
    run = create_or_resume_run(folder, f"{config.name} seed {config.train.seed}", "arm", parent, _identity(arm, base))
    with runs.close_run(run):
        run.log_params({"config": asdict(config), "base_fingerprint": base.fingerprint})
        run.log_inputs(arm.prepared.inputs, "training")
        shared = replace(config, scale=replace(config.scale, cpus_per_worker=get_worker_cores(config.scale, parallel)))
        fitted = run_training(shared, base, arm.prepared, run, folder, view=view)
        if fitted.stopped:
            raise InterruptedByUserError(STOPPED)
        save_prefix(build_learned_prefix(config, base, arm.prepared, run, fitted), folder / "prefix")
        run.log_artifacts(folder / "prefix", "prefix")


def _read_trained_arm(arm: ArmRun) -> TrainedArm:
    prefix = load_prefix(arm.folder / "prefix")
    decisions, losses = (
        runs.read_curve(arm.record.run_id, f"train/validation_{measure}") if arm.record else []
        for measure in ("decision", "loss")
    )
    method = prefix.card.method
    cost = TrainingCost(arm.key, **{name: method.get(name) for name in ("seconds", "tokens", "memory_gib")})
    step = int(method["best_step"])
    return TrainedArm(prefix, losses, cost, SelectedStep(arm.key, step, dict(decisions).get(step), dict(losses).get(step)))


def _identity(arm: ArmRun, base: BaseModel) -> dict[str, Any]:
    return build_run_identity(arm.config.identity(), base, arm.prepared.inputs)
