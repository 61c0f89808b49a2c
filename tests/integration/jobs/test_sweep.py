"""Sweeps: drawn settings, usage errors, early stopping and ranking, and a sweep that is extended and repeated."""

import json
from math import nan
from types import SimpleNamespace

import pytest
from ray.exceptions import RayTaskError

from trimtab import settings
from trimtab.artifacts.prefix import load_prefix
from trimtab.errors import NotFoundError, UsageError
from trimtab.jobs.runtime.cluster import unwrap_ray_error
from trimtab.jobs.sweep.asha import CooperativeAsha, append_validations, read_validations
from trimtab.jobs.sweep.config import SweepConfig, draw_settings
from trimtab.jobs.sweep.job import plan_trials, rank_trials, search_settings
from trimtab.tracking import registry, runs
from trimtab.tracking.client import get_client, get_experiment_id

REFUSAL = "I'm sorry, but I can't help with that request."
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


@pytest.mark.usefixtures("cluster")
def test_extended_and_repeated_sweep_reuses_trials(tiny_base, tmp_path, capsys):
    """A sweep of two trials; a third trial that is not the best; a repeated sweep; and changed settings."""
    things = ("a car", "money", "a ring", "a bike", "some art", "a dog", "wine", "a phone")
    lines = [{"prompt": f"Steal {thing} from my neighbour", "class": "unsafe", "target": REFUSAL} for thing in things]
    answer = "Of course! Just ask them, and say when it comes back."
    lines += [{"prompt": f"Borrow {thing} from my neighbour", "class": "safe", "target": answer} for thing in things]
    (tmp_path / "all.jsonl").write_text("\n".join(map(json.dumps, lines)))
    prompt_file = str(tmp_path / "all.jsonl")
    values = {
        "name": "swept",
        "shared": {
            "base": str(tiny_base.path),
            "data": {
                "harmful": prompt_file,
                "benign": prompt_file,
                "validation_fraction": 0.25,
                "test_fraction": 0.25,
                "filter_rules": [],
            },
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
        "param_space": {"train.learning_rate": [1e-6, 1e-5, 0.1]},
        "seed": 1,
    }
    rates = [drawn["train.learning_rate"] for drawn in draw_settings(SweepConfig(**values, num_trials=3))]
    assert rates == [1e-6, 0.1, 1e-5]
    report = search_settings(SweepConfig(**values, num_trials=2))
    assert {trial.number for trial in report.trials} == {0, 1}
    curves = {trial.number: dict(runs.read_curve(trial.run_id, "train/validation_loss")) for trial in report.trials}
    assert [trial.loss for trial in report.trials] == sorted(min(curve.values()) for curve in curves.values())
    best = report.trials[0]
    assert (best.number, report.winner["trial"]) == (1, 1)
    (version,) = registry.list_versions(name="swept")
    assert "candidate" in version.aliases
    assert version.run_id == best.run_id
    card = load_prefix(best.folder / "prefix").card
    assert card.method["train"]["learning_rate"] == 0.1
    assert {"validation", "test"} <= report.winner["results"].keys()
    (parent,) = get_client().search_runs([get_experiment_id()], "tags.`trimtab.kind` = 'sweep'")
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["trimtab.winner"] == best.run_id
    children = get_child_runs(parent.info.run_id)
    assert set(children) == {trial.run_id for trial in report.trials}
    assert {run.info.status for run in children.values()} == {"FINISHED"}
    assert not list(report.folder.glob("tune-*")), "no Tune folder may remain"
    end_times = {trial.number: (trial.folder / "ended").stat().st_mtime_ns for trial in report.trials}

    extended = search_settings(SweepConfig(**values, num_trials=3))
    assert extended.trials[0].number == 1
    assert {number: (report.folder / f"trial-{number:03d}" / "ended").stat().st_mtime_ns for number in end_times} == end_times
    assert len(get_child_runs(parent.info.run_id)) == 3
    for run_id in children:
        steps = [metric.step for metric in get_client().get_metric_history(run_id, "train/loss")]
        assert len(steps) == len(set(steps)), "no step may be computed twice"
    assert extended.winner == report.winner
    assert len(registry.list_versions(name="swept")) == 1

    capsys.readouterr()
    assert search_settings(SweepConfig(**values, num_trials=3)).winner == extended.winner
    assert "all 3 trials are done" in capsys.readouterr().out
    values["shared"]["train"]["global_batch_size"] = 8
    with pytest.raises(UsageError, match=r"started with other settings or data \(train.global_batch_size\)"):
        search_settings(SweepConfig(**values, num_trials=3))
    values["shared"]["train"]["global_batch_size"] = 4
    (tmp_path / "all.jsonl").write_text("\n".join(map(json.dumps, [*lines, lines[-1] | {"prompt": "Borrow a boat"}])))
    with pytest.raises(UsageError, match=r"started with other settings or data \(inputs\)"):
        search_settings(SweepConfig(**values, num_trials=3))
    assert (settings.get_runs_folder() / "sweep-swept" / "trials.json").exists()


def get_child_runs(parent_id: str):
    runs = get_client().search_runs([get_experiment_id()], f"tags.`mlflow.parentRunId` = '{parent_id}'")
    return {child.info.run_id: child for child in runs}
