"""Validation losses of a trial: kept in a file as they come in, and told to Ray Tune.

Train's controller holds the callback, so this file imports no torch.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from math import isfinite
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ray.train import Checkpoint
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler, TrialScheduler

METRIC, STEP = "validation_loss", "step"
FILE = "validations.jsonl"


class ValidationReporter(TuneReportCallback):
    """Keeps and tells each validation of a trial. Made in the trial's process, called in that of Train's controller."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None) -> None:
        """Called when all workers have reported; worker 0 brings the steps since the last report."""
        for line in append_validations(self._folder, metrics[0].get("history", [])):
            super().after_report(run_context, [line], None)


def append_validations(folder: Path, history: Iterable[Mapping[str, float]]) -> list[dict[str, float]]:
    """Add the validations among the steps of a history to a trial's file; returns the lines that are new.

    A line has the step and the lowest loss up to it (nats per token), which is that of the prefix that would be kept.
    """
    known = read_validations(folder)
    fresh: list[dict[str, float]] = []
    for entry in history:
        last = [*known, *fresh][-1:]
        loss = entry.get(METRIC)
        # Workers that were replaced do some steps twice.
        if loss is None or not isfinite(loss) or any(entry[STEP] <= line[STEP] for line in last):
            continue
        fresh.append({STEP: int(entry[STEP]), METRIC: min([loss, *(line[METRIC] for line in last)])})
    if fresh:
        with (folder / FILE).open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in fresh)
    return fresh


def read_validations(folder: Path) -> list[dict[str, float]]:
    """The lines of a trial's file, in the order of their steps."""
    path = folder / FILE
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class CooperativeAsha(ASHAScheduler):
    """Lets a trial go on at each rung only if it is among the best share of those that came there.

    A killed trial would leave its placement group behind: where Ray has no dashboard, Train's cleaner cannot see that its
    controller is gone, and the cores stay taken. So a poor trial is stopped as Ctrl-C stops training: after the step that it is
    in, with a checkpoint.
    """

    def __init__(self, first: int, longest: int, reduction: float, halt: Callable[[int], bool]) -> None:
        """`first` and `longest` are the steps of the first rung and of the longest trial. `halt` asks the training of a trial,
        by its number, to stop, and says whether there was any."""
        super().__init__(
            time_attr=STEP,
            metric=METRIC,
            mode="min",
            max_t=longest,
            grace_period=min(first, longest),
            reduction_factor=reduction,
            # A trial that came to its last step ends by itself.
            stop_last_trials=False,
        )
        self._halt = halt
        self._stopped: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        # Tune writes its settings to a folder that nothing is read from.
        return {}

    def add_finished_trial(self, number: int, seen: list[dict[str, float]]) -> None:
        """Measure others also by a trial of an earlier call, from its validations."""
        controller: Any = None
        trial: Any = SimpleNamespace(trial_id=f"ended-{number}")
        self.on_trial_add(controller, trial)
        for line in seen:
            super().on_trial_result(controller, trial, line)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Called for each validation."""
        if trial.trial_id in self._stopped:
            return TrialScheduler.CONTINUE
        action = super().on_trial_result(tune_controller, trial, result)
        if action == TrialScheduler.STOP and self._halt(trial.config["trial"]):
            self._stopped.add(trial.trial_id)
            return TrialScheduler.CONTINUE
        return action

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Called for each trial that ended. What one did after it was asked to stop does not count."""
        if trial.trial_id not in self._stopped:
            super().on_trial_complete(tune_controller, trial, result)
