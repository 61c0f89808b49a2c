"""Trials of a sweep: what is kept of each, what Ray Tune runs for it, and the search over all of them.

A trial is a training run in a folder of its own that Tune may end early. Its state is JSON beside Train's checkpoints, so a
sweep goes on without anything of Tune's, whose folder is thrown away.
"""

import logging
import signal
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


@dataclass(frozen=True)
class Trial:
    """One choice of settings, with what they make of the shared ones, and the folder that keeps how far it came."""

    number: int
    chosen: Mapping[str, Any]
    config: AlignConfig
    folder: Path

    @property
    def ended(self) -> bool:
        """Whether it ran to its end, or was stopped for being poor."""
        return (self.folder / "ended").exists()

    @property
    def run_id(self) -> str | None:
        """Its MLflow run, once it has begun."""
        known = read_run_record(self.folder)
        return known.run_id if known else None

    @property
    def loss(self) -> float | None:
        """Its lowest validation loss (nats per token), once there is one."""
        seen = read_validations(self.folder)
        return seen[-1][METRIC] if seen else None

    @property
    def step(self) -> int:
        """The step of its last validation."""
        seen = read_validations(self.folder)
        return int(seen[-1][STEP]) if seen else 0

    def join(self, parent: str, identity: Mapping[str, Any]) -> TrackedRun:
        """Begin its MLflow run under the sweep's, or go on with it; `identity` is what it must then share with this one."""
        return create_or_resume_run(self.folder, f"{self.config.name} trial {self.number}", "trial", parent, identity)


@dataclass(frozen=True)
class TrialSearch:
    """What every trial is given: all trials, their rows, the base model, and the sweep's MLflow run."""

    trials: Sequence[Trial]
    prepared: Sequence[PreparedDataset]
    base: BaseModel
    parent: str


def run_trials(config: SweepConfig, work: TrialSearch, folder: Path) -> dict[int, TrimtabError]:
    """Run all trials that have not ended; returns the errors of those that failed. Raises Interrupted on Ctrl-C."""
    trials = work.trials
    left = [t for t in trials if not t.ended]
    if not left:
        return {}
    first = trials[0].config
    longest = max(t.config.train.steps for t in trials)
    scheduler = CooperativeAsha(
        first.train.validate_every, longest, config.reduction, lambda number: _request_stop(trials[number])
    )
    for trial in trials:
        if trial.ended:
            scheduler.add_finished_trial(trial.number, read_validations(trial.folder))
    # Its words are about Tune's own folder and how to restore it; ours follow.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    waiting = tune.with_parameters(run_trial, work=work, cpus=get_worker_cores(first.scale, config.parallel))
    # The trial itself only waits: the cores are for its workers, and Tune wants a trial to ask for something.
    trainable = tune.with_resources(waiting, {"memory": 1 << 20})
    with ProgressBar("trials", len(trials)) as bar, TemporaryDirectory(dir=folder, prefix="tune-") as scratch:
        tuner = tune.Tuner(
            trainable,
            param_space={"trial": tune.grid_search([t.number for t in left])},
            tune_config=tune.TuneConfig(scheduler=scheduler, max_concurrent_trials=config.parallel),
            run_config=tune.RunConfig(name="tune", storage_path=scratch, verbose=0, callbacks=[TrialProgress(trials, bar)]),
        )
        found = _fit(tuner)
    failed = {int(r.config["trial"]): unwrap_ray_error(r.error) for r in found if r.config and isinstance(r.error, Exception)}
    for number, error in failed.items():
        print_line(f"trial {number} failed: {error}")
    stopped = [t for t in left if not t.ended and t.number not in failed]
    for trial in stopped:
        if trial.run_id:
            TrackedRun(trial.run_id, settings.get_home() / "outbox").finish("KILLED")
    if stopped:
        raise InterruptedByUserError(
            f"stopped; {len(trials) - len(stopped)} of {len(trials)} trials are done, the same command goes on"
        )
    return failed


def run_trial(chosen: dict[str, Any], work: TrialSearch, cpus: float) -> None:
    """One trial, in an actor of Tune's; Train's workers are its own, with so many cores each."""
    trial = work.trials[chosen["trial"]]
    for line in read_validations(trial.folder):
        tune.report(line)
    config = replace(trial.config, scale=replace(trial.config.scale, cpus=cpus))
    prepared = work.prepared[trial.number]
    run = trial.join(work.parent, build_run_identity(trial.config, work.base, prepared.inputs))
    run.params({"config": asdict(trial.config), "base_fingerprint": work.base.fingerprint})
    run.inputs(prepared.inputs, "training")
    run_training(config, work.base, prepared, run, trial.folder, [ValidationReporter(trial.folder)])


class TrialProgress(tune.Callback):
    """Moves the bar, and ends the MLflow runs of trials as they end."""

    def __init__(self, trials: Sequence[Trial], bar: ProgressBar) -> None:
        self._failed = 0
        self._trials = trials
        self._bar = bar

    def __getstate__(self) -> dict[str, Any]:
        # Tune writes its settings to a folder that nothing is read from; a bar cannot be written.
        return {}

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any) -> None:
        """Called for each validation."""
        self._move()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Called for each trial that came to its end or was stopped for being poor."""
        _end(self._trials[trial.config["trial"]])
        self._move()

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Called for each trial that failed."""
        self._failed += 1
        run_id = self._trials[trial.config["trial"]].run_id
        if run_id:
            TrackedRun(run_id, settings.get_home() / "outbox").finish("FAILED")
        self._move()

    def _move(self) -> None:
        done = sum(t.ended for t in self._trials) + self._failed
        best = min((t.loss for t in self._trials if t.loss is not None), default=None)
        notes = [f"{self._failed} failed"] if self._failed else []
        notes += [f"lowest validation loss {best:.3f}"] if best is not None else []
        self._bar.update(done, note=" ".join(f"| {note}" for note in notes))


def _fit(tuner: tune.Tuner) -> tune.ResultGrid:
    handler = signal.getsignal(signal.SIGINT)
    try:
        return tuner.fit()
    except (RayError, TuneError) as error:
        raise unwrap_ray_error(error) from error
    finally:
        # Tune takes Ctrl-C for itself, and does not give it back.
        if signal.getsignal(signal.SIGINT) != handler:
            signal.signal(signal.SIGINT, handler)


def _request_stop(trial: Trial) -> bool:
    try:
        board: Any = ray.get_actor(format_actor_name(str(trial.run_id)))
        ray.get(board.stop.remote())
    except (RayError, ValueError):
        return False
    return True


def _end(trial: Trial) -> None:
    (trial.folder / "ended").touch()
    if trial.run_id is None:
        return
    run = TrackedRun(trial.run_id, settings.get_home() / "outbox")
    if trial.loss is not None:
        run.log_metrics({f"lowest_{METRIC}": trial.loss}, trial.step)
    run.set_tags({"trimtab.trial": "to its end" if trial.step == trial.config.train.steps else "stopped early"})
    run.finish("FINISHED")
