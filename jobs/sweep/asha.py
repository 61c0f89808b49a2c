"""Validation losses of trials and the ASHA scheduler that compares them.

Ray Train's controller imports the callback, so this module must not import torch.
"""

from collections.abc import Callable, Iterable, Mapping
from math import isfinite
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ray.train import Checkpoint
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler, TrialScheduler

from trimtab.jobs.runtime.jsonl import append_jsonl, read_jsonl

METRIC, STEP = "validation_loss", "step"
FILE = "validations.jsonl"


class ValidationReporter(TuneReportCallback):
    """Callback that stores each validation of a trial and reports it to Ray Tune.

    The trial's process creates it; the process of Train's controller calls it.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None) -> None:
        """Store and report new validations; Ray Train calls this after every worker has reported.

        Args:
            run_context: context of the training run.
            metrics: one entry per worker; that of worker 0 has the steps since the last report under `history`.
            checkpoint: reported checkpoint, if any; unused.
        """
        for line in append_validations(self._folder, metrics[0].get("history", [])):
            super().after_report(run_context, [line], None)


def append_validations(folder: Path, history: Iterable[Mapping[str, float]]) -> list[dict[str, float]]:
    """Append the new validations in a history to a trial's file.

    Each line has a step and the lowest loss up to that step (nats per token), the loss of the best checkpoint so far.

    Args:
        folder: folder of the trial.
        history: steps in increasing order, each with `step` and, if it was validated, `validation_loss`.

    Returns:
        The appended lines.
    """
    stored = read_validations(folder)
    added: list[dict[str, float]] = []
    for entry in history:
        last = [*stored, *added][-1:]
        loss = entry.get(METRIC)
        # Replaced workers repeat the steps since the last checkpoint.
        if loss is None or not isfinite(loss) or any(entry[STEP] <= line[STEP] for line in last):
            continue
        added.append({STEP: int(entry[STEP]), METRIC: min([loss, *(line[METRIC] for line in last)])})
    if added:
        append_jsonl(folder / FILE, added)
    return added


def read_validations(folder: Path) -> list[dict[str, float]]:
    """Return the lines of a trial's file in the order of their steps; an empty list if there is no file."""
    return list(read_jsonl(folder / FILE))


class CooperativeAsha(ASHAScheduler):
    """ASHA scheduler that stops trials through their own training loop instead of killing them.

    At each rung, a trial continues only if it is among the best share of the trials that reached the rung. A killed trial
    would leave its placement group behind: without a Ray dashboard, Train's cleanup cannot see that the controller is gone, and
    the cores stay reserved. A poor trial therefore stops like on Ctrl-C: after the current step, with a checkpoint.
    """

    def __init__(self, first: int, longest: int, reduction: float, halt: Callable[[int], bool]) -> None:
        """Initialize the scheduler.

        Args:
            first: step of the first rung.
            longest: number of steps of the longest trial.
            reduction: reduction factor of ASHA; one of `reduction` trials continues at each rung.
            halt: function that requests the training of a trial, given by its number, to stop; it returns False if no
                training runs.
        """
        super().__init__(
            time_attr=STEP,
            metric=METRIC,
            mode="min",
            max_t=longest,
            grace_period=min(first, longest),
            reduction_factor=reduction,
            # A trial ends by itself after its last step.
            stop_last_trials=False,
        )
        self._halt = halt
        self._stopped: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles the scheduler into a folder that is never read.
        return {}

    def add_finished_trial(self, number: int, validations: list[dict[str, float]]) -> None:
        """Add a trial of an earlier call to the rungs, so that new trials are compared with it.

        Args:
            number: number of the trial.
            validations: lines of its file.
        """
        controller: Any = None
        trial: Any = SimpleNamespace(trial_id=f"ended-{number}")
        self.on_trial_add(controller, trial)
        for line in validations:
            super().on_trial_result(controller, trial, line)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Decide whether a trial continues after a validation.

        Args:
            tune_controller: controller of the search.
            trial: Tune trial, whose `config["trial"]` is the number.
            result: validation with step and loss.

        Returns:
            TrialScheduler.CONTINUE, or TrialScheduler.STOP for a poor trial that has no running training to stop.
        """
        if trial.trial_id in self._stopped:
            return TrialScheduler.CONTINUE
        action = super().on_trial_result(tune_controller, trial, result)
        if action == TrialScheduler.STOP and self._halt(trial.config["trial"]):
            self._stopped.add(trial.trial_id)
            return TrialScheduler.CONTINUE
        return action

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Record the result of a trial that ended; ignore a trial that was stopped early.

        Args:
            tune_controller: controller of the search.
            trial: Tune trial.
            result: last result of the trial.
        """
        if trial.trial_id not in self._stopped:
            super().on_trial_complete(tune_controller, trial, result)
