"""What stops poor trials early: Ray Tune's ASHA, which here asks a trial to stop instead of killing it."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from ray.tune.schedulers import ASHAScheduler, TrialScheduler

from trimtab.jobs.validations import METRIC, STEP


class Rungs(ASHAScheduler):
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

    def know(self, number: int, seen: list[dict[str, float]]) -> None:
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
