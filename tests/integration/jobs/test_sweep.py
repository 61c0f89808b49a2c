"""Sweeps: drawn settings, usage errors, early stopping and ranking, and a sweep that is extended and repeated."""

import copy
import json
from dataclasses import dataclass
from math import nan
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow.entities import Run
from ray.exceptions import RayTaskError

from tests.support.prompt_rows import write_class_file
from trimtab import settings
from trimtab.artifacts.prefix import load_prefix
from trimtab.cli.console import console
from trimtab.errors import NotFoundError, UsageError
from trimtab.jobs.runtime.cluster import unwrap_ray_error
from trimtab.jobs.sweep.asha import CooperativeAsha, append_validations, read_validations
from trimtab.jobs.sweep.config import SweepConfig, draw_settings
from trimtab.jobs.sweep.job import SweepResult, plan_trials, rank_trials, search_settings
from trimtab.tracking import registry, runs
from trimtab.tracking.client import get_client, get_experiment_id

RATE = {"low": 0.01, "high": 0.2, "log": True}


def test_draws_depend_on_the_seed_and_not_on_the_number_of_trials():
    space = {"train.learning_rate": RATE, "num_virtual_tokens": {"low": 1, "high": 4}, "position": ["system", "user"]}
    five, forty = (draw_settings(SweepConfig(param_space=space, num_trials=count)) for count in (5, 40))
    assert forty[:5] == five
    assert len({json.dumps(drawn) for drawn in forty}) == 40
    assert all(0.01 <= drawn["train.learning_rate"] <= 0.2 for drawn in forty)
    assert {drawn["num_virtual_tokens"] for drawn in forty} == {1, 2, 3, 4}
    assert all(type(drawn["num_virtual_tokens"]) is int for drawn in forty)
    assert draw_settings(SweepConfig(param_space=space, num_trials=5, seed=1)) != five


def test_small_space_is_searched_exhaustively():
    trials = draw_settings(
        SweepConfig(param_space={"num_virtual_tokens": [1, 2], "objective_options": {"gamma": [0.0, 1.0, 2.0]}}, num_trials=50)
    )
    assert len(trials) == 6
    assert {(drawn["num_virtual_tokens"], drawn["objective_options.gamma"]) for drawn in trials} == {
        (rows, gamma) for rows in (1, 2) for gamma in (0.0, 1.0, 2.0)
    }


def test_trial_settings_extend_the_shared_settings(tmp_path):
    space = {
        "train": {"global_batch_size": [8]},
        "objective": ["dpo"],
        "objective_options.beta": [0.5],
        "data.filter_rules": [["length"]],
    }
    config = SweepConfig(
        name="mine", shared={"train": {"max_steps": 9, "validate_every": 3}, "num_virtual_tokens": 2}, param_space=space
    )
    (trial,) = plan_trials(config, tmp_path)
    align_config = trial.config
    assert (align_config.name, align_config.num_virtual_tokens, align_config.objective, align_config.objective_options) == (
        "mine",
        2,
        "dpo",
        {"beta": 0.5},
    )
    assert (align_config.train.max_steps, align_config.train.global_batch_size, align_config.data.filter_rules) == (
        9,
        8,
        ["length"],
    )
    assert align_config.register


INVALID_SPACES = {
    "empty space": ({}, "param_space is empty"),
    "one value": ({"num_virtual_tokens": 3}, "param_space.num_virtual_tokens: give a list of choices, or low and high"),
    "no choices": ({"num_virtual_tokens": []}, "param_space.num_virtual_tokens: give a list of choices"),
    "range without high": ({"train": {"learning_rate": {"low": 0.1}}}, "param_space.train.learning_rate: give a list"),
    "reversed range": (
        {"num_virtual_tokens": {"low": 4, "high": 1}},
        r"param_space.num_virtual_tokens: low \(4\) must be below high \(1\)",
    ),
    "text": ({"num_virtual_tokens": {"low": "a", "high": "b"}}, "param_space.num_virtual_tokens: low and high must be numbers"),
    "logarithm of zero": (
        {"num_virtual_tokens": {"low": 0, "high": 4, "log": True}},
        "param_space.num_virtual_tokens: low must be above 0 if log",
    ),
    "unknown setting": ({"train.speed": [1]}, "trial 0 .train.speed 1.: .*speed"),
    "wrong type": ({"train.max_steps": ["many"]}, "trial 0 .*steps"),
    "out of bounds": ({"train.global_batch_size": [0]}, "train.global_batch_size must be at least 1"),
    "unknown objective option": ({"objective_options.beam": [3]}, "unexpected keyword argument 'beam'"),
    "unknown objective": ({"objective": ["magic"]}, "there are: bco"),
    "target length": (
        {"train.max_target_tokens": [8, 16]},
        "param_space.train.max_target_tokens: all trials must have the same value",
    ),
    "test fraction": (
        {"data": [{"test_fraction": 0.3}]},
        "param_space.data.test_fraction: all trials must have the same value",
    ),
    "gate": ({"gate.min_improvement": [0.5]}, "param_space.gate.min_improvement: all trials must have the same value"),
}


@pytest.mark.parametrize(("space", "message"), INVALID_SPACES.values(), ids=INVALID_SPACES)
def test_rejects_invalid_spaces(space, message, tmp_path):
    with pytest.raises((UsageError, NotFoundError), match=message) as error:
        plan_trials(SweepConfig(param_space=space), tmp_path)
    assert "\n" not in str(error.value)


def test_rejects_invalid_sweeps(tmp_path):
    with pytest.raises(UsageError, match=r"num_trials \(0\) and max_concurrent_trials"):
        SweepConfig(num_trials=0)
    with pytest.raises(UsageError, match="reduction_factor must be above 1"):
        SweepConfig(reduction_factor=1)
    with pytest.raises(UsageError, match="validate_every in shared above 0"):
        plan_trials(SweepConfig(shared={"train.validate_every": 0}), tmp_path)


def test_validations_are_recorded_once_and_never_rise(tmp_path):
    first = [{"step": 1, "loss": 9.0}, {"step": 2, "validation_loss": 3.0}, {"step": 4, "validation_loss": 5.0}]
    assert append_validations(tmp_path, first) == [
        {"step": 2, "validation_loss": 3.0},
        {"step": 4, "validation_loss": 3.0},
    ]
    repeated = [{"step": 4, "validation_loss": 5.0}, {"step": 6, "validation_loss": nan}, {"step": 8, "validation_loss": 2.0}]
    assert append_validations(tmp_path, repeated) == [{"step": 8, "validation_loss": 2.0}]
    assert [line["step"] for line in read_validations(tmp_path)] == [2, 4, 8]


def test_half_a_line_of_a_full_disk_does_not_stop_a_sweep(tmp_path):
    append_validations(tmp_path, [{"step": 2, "validation_loss": 3.0}])
    (file,) = [path for path in tmp_path.iterdir() if path.suffix != ".lock"]
    with file.open("a") as lines:
        lines.write('{"step": 4, "valid')
    append_validations(tmp_path, [{"step": 6, "validation_loss": 2.0}])
    assert [line["step"] for line in read_validations(tmp_path)] == [2, 6]


def test_trials_are_ranked_by_lowest_validation_loss(tmp_path):
    config = SweepConfig(param_space={"num_virtual_tokens": [1, 2, 3, 4]}, num_trials=4)
    trials = plan_trials(config, tmp_path)
    for trial, losses in zip(trials, [(2.0, 1.5), (1.2, 1.9), (), (1.3,)], strict=True):
        trial.folder.mkdir()
        append_validations(
            trial.folder, [{"step": 30 * (index + 1), "validation_loss": loss} for index, loss in enumerate(losses)]
        )
    assert [trial.number for trial in rank_trials(trials)] == [1, 3, 0]


def test_asha_compares_with_finished_trials():
    stopped: list[int] = []
    scheduler = CooperativeAsha(10, 90, 3, lambda number: stopped.append(number) is None)
    for number, loss in ((0, 1.0), (1, 3.0)):
        scheduler.add_finished_trial(number, [{"step": 10, "validation_loss": loss}])
    for number, losses in ((2, (0.9, 0.8, 0.8)), (3, (2.0, 1.9, 0.1))):
        trial = SimpleNamespace(trial_id=str(number), config={"trial": number})
        scheduler.on_trial_add(None, trial)
        for step, loss in zip((10, 20, 30), losses, strict=True):
            assert scheduler.on_trial_result(None, trial, {"step": step, "validation_loss": loss}) == "CONTINUE"
        scheduler.on_trial_complete(None, trial, {"step": 90, "validation_loss": losses[-1]})
    assert stopped == [3]


def test_user_error_of_a_ray_task_is_unwrapped():
    error = RayTaskError("trial", "Traceback (most recent call last):\n  ...", UsageError("say which"))
    assert str(unwrap_ray_error(error.as_instanceof_cause())) == "say which"


@dataclass(frozen=True)
class SweepStages:
    """A sweep of one trial, the same sweep with a second trial that is not better, and its repetition.

    Attributes:
        config: settings without the number of trials.
        prompts: file of the prompts.
        first: result with one trial.
        extended: result with two trials.
        repeated: result of the repetition.
        ended: times at which the first trial ended (nanoseconds), after the first and after the second stage.
        output: output of the repetition.
    """

    config: dict[str, Any]
    prompts: Path
    first: SweepResult
    extended: SweepResult
    repeated: SweepResult
    ended: list[int]
    output: str


@pytest.fixture(scope="module")
def sweep_stages(cluster, tiny_base, tmp_path_factory) -> SweepStages:
    prompts = tmp_path_factory.mktemp("sweep") / "all.jsonl"
    config = {
        "name": "swept",
        "shared": {
            "base": str(tiny_base.path),
            "data": {**write_class_file(prompts), "validation_fraction": 0.25, "test_fraction": 0.25, "filter_rules": []},
            "train": {
                "max_steps": 4,
                "global_batch_size": 4,
                "micro_batch_size": 4,
                "validate_every": 2,
                "warmup_ratio": 0.0,
                "max_target_tokens": 8,
            },
            "evaluate": {"limit": 2, "max_tokens": 4},
        },
        "param_space": {"train.learning_rate": [1e-6, 0.1]},
    }
    rates = [drawn["train.learning_rate"] for drawn in draw_settings(SweepConfig(**config, num_trials=2))]
    assert rates == [0.1, 1e-6]
    first = search_settings(SweepConfig(**config, num_trials=1))
    ended = [read_end_time(first.folder)]
    extended = search_settings(SweepConfig(**config, num_trials=2))
    ended.append(read_end_time(first.folder))
    with console.capture() as capture:
        repeated = search_settings(SweepConfig(**config, num_trials=2))
    return SweepStages(config, prompts, first, extended, repeated, ended, capture.get())


def read_end_time(folder: Path) -> int:
    return (folder / "trial-000" / "ended").stat().st_mtime_ns


def get_sweep_run() -> Run:
    (run,) = get_client().search_runs([get_experiment_id()], "tags.`trimtab.kind` = 'sweep'")
    return run


def test_trials_are_ranked_by_their_curves(sweep_stages):
    report = sweep_stages.extended
    assert {trial.number for trial in report.trials} == {0, 1}
    curves = [dict(runs.read_curve(trial.run_id, "train/validation_loss")) for trial in report.trials]
    assert [trial.loss for trial in report.trials] == sorted(min(curve.values()) for curve in curves)
    assert (report.trials[0].number, report.winner["trial"]) == (0, 0)


def test_best_trial_is_registered_and_evaluated(sweep_stages):
    best = sweep_stages.first.trials[0]
    (version,) = registry.list_versions(name="swept")
    assert "candidate" in version.aliases
    assert version.run_id == best.run_id
    assert load_prefix(best.folder / "prefix").card.method["train"]["learning_rate"] == 0.1
    assert {"validation", "test"} <= sweep_stages.first.winner["results"].keys()


def test_sweep_run_has_a_child_for_each_trial(sweep_stages):
    parent = get_sweep_run()
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["trimtab.winner"] == sweep_stages.first.trials[0].run_id
    children = get_child_runs(parent.info.run_id)
    assert set(children) == {trial.run_id for trial in sweep_stages.extended.trials}
    assert len(children) == 2
    assert {run.info.status for run in children.values()} == {"FINISHED"}
    for run_id in children:
        steps = [metric.step for metric in get_client().get_metric_history(run_id, "train/loss")]
        assert len(steps) == len(set(steps)), "no step may be computed twice"


def test_sweep_folder_has_trials_and_nothing_of_tune(sweep_stages):
    assert (settings.get_runs_folder() / "sweep-swept" / "trials.json").exists()
    assert not list(sweep_stages.first.folder.glob("tune-*"))


def test_extended_sweep_reuses_trials(sweep_stages):
    assert sweep_stages.extended.trials[0].number == 0
    assert sweep_stages.ended[0] == sweep_stages.ended[1], "the first trial may not be trained again"
    assert sweep_stages.extended.winner == sweep_stages.first.winner


def test_repeated_sweep_trains_nothing(sweep_stages):
    assert sweep_stages.repeated.winner == sweep_stages.extended.winner
    assert "all 2 trials are done" in sweep_stages.output


def test_rejects_sweep_with_other_settings(sweep_stages):
    changed = copy.deepcopy(sweep_stages.config)
    changed["shared"]["train"]["global_batch_size"] = 8
    with pytest.raises(UsageError, match=r"started with other settings or data \(train.global_batch_size\)"):
        search_settings(SweepConfig(**changed, num_trials=2))


def test_rejects_sweep_with_other_data(sweep_stages):
    text = sweep_stages.prompts.read_text()
    row = json.loads(text.splitlines()[-1]) | {"prompt": "Borrow a boat"}
    try:
        sweep_stages.prompts.write_text(f"{text}\n{json.dumps(row)}")
        with pytest.raises(UsageError, match=r"started with other settings or data \(inputs\)"):
            search_settings(SweepConfig(**sweep_stages.config, num_trials=2))
    finally:
        sweep_stages.prompts.write_text(text)


def get_child_runs(parent_id: str):
    runs = get_client().search_runs([get_experiment_id()], f"tags.`mlflow.parentRunId` = '{parent_id}'")
    return {child.info.run_id: child for child in runs}
