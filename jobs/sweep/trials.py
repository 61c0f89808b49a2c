"""Trials of a sweep: their stored state, their execution, and the search over all of them.

A trial is a training run in its own folder that Ray Tune may stop early. Its state is JSON next to Train's checkpoints, so a
sweep can be resumed without the folder of Tune, which is temporary.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ray
from ray import tune
from ray.exceptions import RayError
from ray.tune import TuneError

from trimtab import settings
from trimtab.cli.console import ProgressBar, print_line
from trimtab.errors import InterruptedByUserError, TrimtabError
from trimtab.jobs.align.config import AlignConfig
from trimtab.jobs.align.dataset import PreparedDataset, build_run_identity
from trimtab.jobs.align.driver import get_worker_cores, run_training
from trimtab.jobs.runtime.cluster import unwrap_ray_error
from trimtab.jobs.runtime.control_actor import format_actor_name
from trimtab.jobs.runtime.run_state import create_or_resume_run, read_run_record
from trimtab.jobs.sweep.asha import METRIC, STEP, CooperativeAsha, ValidationReporter, read_validations
from trimtab.jobs.sweep.config import SweepConfig
from trimtab.model.base_model import BaseModel
from trimtab.tracking.runs import TrackedRun
from trimtab.util.termination import preserve_handlers


@dataclass(frozen=True)
class Trial:
    """Training run with one choice of settings.

    Attributes:
        number: number of the trial, from 0.
        chosen: sampled settings by dotted name.
        config: complete training settings.
        folder: folder of the checkpoints and the state.
    """

    number: int
    chosen: Mapping[str, Any]
    config: AlignConfig
    folder: Path

    @property
    def ended(self) -> bool:
        """Whether the trial ran to its last step or was stopped early."""
        return (self.folder / "ended").exists()

    @property
    def run_id(self) -> str | None:
        """Id of the MLflow run, None if the trial has not started."""
        record = read_run_record(self.folder)
        return record.run_id if record else None

    @property
    def loss(self) -> float | None:
        """Lowest validation loss (nats per token), None before the first validation."""
        validations = read_validations(self.folder)
        return validations[-1][METRIC] if validations else None

    @property
    def step(self) -> int:
        """Step of the last validation, 0 before the first one."""
        validations = read_validations(self.folder)
        return int(validations[-1][STEP]) if validations else 0

    def join(self, parent: str, identity: Mapping[str, Any]) -> TrackedRun:
        """Start or resume the MLflow run of the trial.

        Args:
            parent: id of the sweep's MLflow run.
            identity: settings and data of the trial, stored to detect changes in later calls.
        """
        return create_or_resume_run(self.folder, f"{self.config.name} trial {self.number}", "trial", parent, identity)


@dataclass(frozen=True)
class TrialSearch:
    """Inputs that all trials share.

    Attributes:
        trials: all trials of the sweep.
        prepared: rows of each trial, by trial number.
        base: base model.
        parent: id of the sweep's MLflow run.
    """

    trials: Sequence[Trial]
    prepared: Sequence[PreparedDataset]
    base: BaseModel
    parent: str


def run_trials(config: SweepConfig, work: TrialSearch, folder: Path) -> dict[int, TrimtabError]:
    """Run all trials that have not ended.

    Args:
        config: settings of the sweep.
        work: trials and their inputs.
        folder: folder of the sweep.

    Returns:
        Errors of the failed trials by trial number.

    Raises:
        InterruptedByUserError: on Ctrl-C.
    """
    trials = work.trials
    pending = [t for t in trials if not t.ended]
    if not pending:
        return {}
    first = trials[0].config
    longest = max(t.config.train.max_steps for t in trials)
    scheduler = CooperativeAsha(
        first.train.validate_every, longest, config.reduction_factor, lambda number: _request_stop(trials[number])
    )
    for trial in trials:
        if trial.ended:
            scheduler.add_finished_trial(trial.number, read_validations(trial.folder))
    # Tune logs how to restore its own folder, which is temporary here.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    function = tune.with_parameters(run_trial, work=work, cpus=get_worker_cores(first.scale, config.max_concurrent_trials))
    # The trial itself only waits, so that its workers get the cores; Tune requires a nonempty resource request.
    trainable = tune.with_resources(function, {"memory": 1 << 20})
    with ProgressBar("trials", len(trials)) as bar, TemporaryDirectory(dir=folder, prefix="tune-") as scratch:
        tuner = tune.Tuner(
            trainable,
            param_space={"trial": tune.grid_search([t.number for t in pending])},
            tune_config=tune.TuneConfig(scheduler=scheduler, max_concurrent_trials=config.max_concurrent_trials),
            run_config=tune.RunConfig(name="tune", storage_path=scratch, verbose=0, callbacks=[TrialProgress(trials, bar)]),
        )
        results = _fit(tuner)
    failed = {int(r.config["trial"]): unwrap_ray_error(r.error) for r in results if r.config and isinstance(r.error, Exception)}
    for number, error in failed.items():
        print_line(f"trial {number} failed: {error}")
    stopped = [t for t in pending if not t.ended and t.number not in failed]
    for trial in stopped:
        if trial.run_id:
            TrackedRun(trial.run_id, settings.get_home() / "outbox").finish("KILLED")
    if stopped:
        raise InterruptedByUserError(
            f"stopped; {len(trials) - len(stopped)} of {len(trials)} trials are done. Run the same command to resume"
        )
    return failed


def run_trial(chosen: dict[str, Any], work: TrialSearch, cpus: float) -> None:
    """Run one trial in an actor of Ray Tune.

    Args:
        chosen: parameters of Tune, with the trial number under `trial`.
        work: trials and their inputs.
        cpus: CPU cores of each training worker.
    """
    trial = work.trials[chosen["trial"]]
    for line in read_validations(trial.folder):
        tune.report(line)
    config = replace(trial.config, scale=replace(trial.config.scale, cpus_per_worker=cpus))
    prepared = work.prepared[trial.number]
    run = trial.join(work.parent, build_run_identity(trial.config.identity(), work.base, prepared.inputs))
    run.log_params({"config": asdict(trial.config), "base_fingerprint": work.base.fingerprint})
    run.log_inputs(prepared.inputs, "training")
    run_training(config, work.base, prepared, run, trial.folder, [ValidationReporter(trial.folder)])


class TrialProgress(tune.Callback):
    """Tune callback that updates the progress bar and finishes the MLflow runs of trials."""

    def __init__(self, trials: Sequence[Trial], bar: ProgressBar) -> None:
        self._failed = 0
        self._trials = trials
        self._bar = bar

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles its callbacks into a folder that is never read; a progress bar cannot be pickled.
        return {}

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any) -> None:
        """Update the progress bar after a validation."""
        self._update_bar()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Finish a trial that ran to its last step or was stopped early."""
        _finish_trial(self._trials[trial.config["trial"]])
        self._update_bar()

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Mark the MLflow run of a failed trial."""
        self._failed += 1
        run_id = self._trials[trial.config["trial"]].run_id
        if run_id:
            TrackedRun(run_id, settings.get_home() / "outbox").finish("FAILED")
        self._update_bar()

    def _update_bar(self) -> None:
        done = sum(t.ended for t in self._trials) + self._failed
        best = min((t.loss for t in self._trials if t.loss is not None), default=None)
        notes = [f"{self._failed} failed"] if self._failed else []
        notes += [f"lowest validation loss {best:.3f}"] if best is not None else []
        self._bar.update(done, note=" ".join(f"| {note}" for note in notes))


def _fit(tuner: tune.Tuner) -> tune.ResultGrid:
    try:
        # Tune installs its own SIGINT handler and does not restore the previous one.
        with preserve_handlers():
            return tuner.fit()
    except (RayError, TuneError) as error:
        raise unwrap_ray_error(error) from error


def _request_stop(trial: Trial) -> bool:
    try:
        control: Any = ray.get_actor(format_actor_name(str(trial.run_id)))
        ray.get(control.stop.remote())
    except (RayError, ValueError):
        return False
    return True


def _finish_trial(trial: Trial) -> None:
    (trial.folder / "ended").touch()
    if trial.run_id is None:
        return
    run = TrackedRun(trial.run_id, settings.get_home() / "outbox")
    if trial.loss is not None:
        run.log_metrics({f"lowest_{METRIC}": trial.loss}, trial.step)
    run.set_tags({"trimtab.trial": "to its end" if trial.step == trial.config.train.max_steps else "stopped early"})
    run.finish("FINISHED")
