"""Sweeps: what is drawn and refused, what decides, and one from end to end that goes on twice."""

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


def test_the_same_seed_draws_the_same_and_more_trials_begin_with_fewer():
    space = {"train.learning_rate": RATE, "num_virtual_tokens": {"low": 1, "high": 4}, "position": ["system", "user"]}
    few, many = (draw_settings(SweepConfig(param_space=space, num_trials=n)) for n in (5, 40))
    assert many[:5] == few
    assert len({json.dumps(one) for one in many}) == 40
    assert all(0.01 <= one["train.learning_rate"] <= 0.2 for one in many)
    assert {one["num_virtual_tokens"] for one in many} == {1, 2, 3, 4}
    assert all(type(one["num_virtual_tokens"]) is int for one in many)
    assert draw_settings(SweepConfig(param_space=space, num_trials=5, seed=1)) != few


def test_a_small_space_is_tried_whole_and_once():
    found = draw_settings(
        SweepConfig(param_space={"num_virtual_tokens": [1, 2], "objective_options": {"gamma": [0.0, 1.0, 2.0]}}, num_trials=50)
    )
    assert len(found) == 6
    assert {(one["num_virtual_tokens"], one["objective_options.gamma"]) for one in found} == {
        (r, g) for r in (1, 2) for g in (0.0, 1.0, 2.0)
    }


def test_a_trial_is_the_shared_settings_and_what_was_drawn(tmp_path):
    space = {
        "train": {"global_batch_size": [8]},
        "objective": ["dpo"],
        "objective_options.beta": [0.5],
        "data.filter_rules": [["length"]],
    }
    config = SweepConfig(
        name="mine", shared={"train": {"max_steps": 9, "validate_every": 3}, "num_virtual_tokens": 2}, param_space=space
    )
    (only,) = plan_trials(config, tmp_path)
    made = only.config
    assert (made.name, made.num_virtual_tokens, made.objective, made.objective_options) == ("mine", 2, "dpo", {"beta": 0.5})
    assert (made.train.max_steps, made.train.global_batch_size, made.data.filter_rules) == (9, 8, ["length"])
    assert made.register


WRONG = {
    "nothing": ({}, "param_space is empty"),
    "one value": ({"num_virtual_tokens": 3}, "param_space.num_virtual_tokens: give a list of choices, or low and high"),
    "no choices": ({"num_virtual_tokens": []}, "param_space.num_virtual_tokens: give a list of choices"),
    "half a range": ({"train": {"learning_rate": {"low": 0.1}}}, "param_space.train.learning_rate: give a list"),
    "upside down": (
        {"num_virtual_tokens": {"low": 4, "high": 1}},
        r"param_space.num_virtual_tokens: low \(4\) must be below high \(1\)",
    ),
    "text": ({"num_virtual_tokens": {"low": "a", "high": "b"}}, "param_space.num_virtual_tokens: low and high must be numbers"),
    "logarithm of zero": (
        {"num_virtual_tokens": {"low": 0, "high": 4, "log": True}},
        "param_space.num_virtual_tokens: low must be above 0 if log",
    ),
    "no such setting": ({"train.speed": [1]}, "trial 0 .train.speed 1.: .*speed"),
    "wrong type": ({"train.max_steps": ["many"]}, "trial 0 .*steps"),
    "out of bounds": ({"train.global_batch_size": [0]}, "train.global_batch_size must be at least 1"),
    "no such option": ({"objective_options.beam": [3]}, "unexpected keyword argument 'beam'"),
    "no such objective": ({"objective": ["magic"]}, "there are: bco"),
    "what is measured with": (
        {"train.max_target_tokens": [8, 16]},
        "param_space.train.max_target_tokens: all trials must have the same value",
    ),
    "the test part": (
        {"data": [{"test_fraction": 0.3}]},
        "param_space.data.test_fraction: all trials must have the same value",
    ),
    "the gate": ({"gate.min_improvement": [0.5]}, "param_space.gate.min_improvement: all trials must have the same value"),
}


@pytest.mark.parametrize(("space", "expected"), WRONG.values(), ids=WRONG)
def test_wrong_spaces_end_in_one_line(space, expected, tmp_path):
    with pytest.raises((UsageError, NotFoundError), match=expected) as raised:
        plan_trials(SweepConfig(param_space=space), tmp_path)
    assert "\n" not in str(raised.value)


def test_other_wrong_sweeps_end_in_one_line(tmp_path):
    with pytest.raises(UsageError, match=r"num_trials \(0\) and max_concurrent_trials"):
        SweepConfig(num_trials=0)
    with pytest.raises(UsageError, match="reduction_factor must be above 1"):
        SweepConfig(reduction_factor=1)
    with pytest.raises(UsageError, match="validate_every in shared above 0"):
        plan_trials(SweepConfig(shared={"train.validate_every": 0}), tmp_path)


def test_validations_are_kept_once_and_never_rise(tmp_path):
    first = [{"step": 1, "loss": 9.0}, {"step": 2, "validation_loss": 3.0}, {"step": 4, "validation_loss": 5.0}]
    assert append_validations(tmp_path, first) == [
        {"step": 2, "validation_loss": 3.0},
        {"step": 4, "validation_loss": 3.0},
    ]
    again = [{"step": 4, "validation_loss": 5.0}, {"step": 6, "validation_loss": nan}, {"step": 8, "validation_loss": 2.0}]
    assert append_validations(tmp_path, again) == [{"step": 8, "validation_loss": 2.0}]
    assert [line["step"] for line in read_validations(tmp_path)] == [2, 4, 8]


def test_the_lowest_validation_loss_wins(tmp_path):
    config = SweepConfig(param_space={"num_virtual_tokens": [1, 2, 3, 4]}, num_trials=4)
    planned = plan_trials(config, tmp_path)
    for trial, losses in zip(planned, [(2.0, 1.5), (1.2, 1.9), (), (1.3,)], strict=True):
        trial.folder.mkdir()
        append_validations(trial.folder, [{"step": 30 * (at + 1), "validation_loss": loss} for at, loss in enumerate(losses)])
    assert [t.number for t in rank_trials(planned)] == [1, 3, 0]


def test_a_poor_trial_is_asked_to_stop_also_because_of_what_ended_before():
    asked: list[int] = []
    rungs = CooperativeAsha(10, 90, 3, lambda number: asked.append(number) is None)
    for number, loss in ((0, 1.0), (1, 3.0)):
        rungs.add_finished_trial(number, [{"step": 10, "validation_loss": loss}])
    for number, losses in ((2, (0.9, 0.8, 0.8)), (3, (2.0, 1.9, 0.1))):
        trial = SimpleNamespace(trial_id=str(number), config={"trial": number})
        rungs.on_trial_add(None, trial)
        for step, loss in zip((10, 20, 30), losses, strict=True):
            assert rungs.on_trial_result(None, trial, {"step": step, "validation_loss": loss}) == "CONTINUE"
        rungs.on_trial_complete(None, trial, {"step": 90, "validation_loss": losses[-1]})
    assert asked == [3]


def test_what_fails_on_the_cluster_is_named_in_one_line():
    failed = RayTaskError("trial", "Traceback (most recent call last):\n  ...", UsageError("say which"))
    assert str(unwrap_ray_error(failed.as_instanceof_cause())) == "say which"


@pytest.mark.usefixtures("cluster")
def test_a_sweep_from_end_to_end_goes_on_and_does_nothing_twice(small, tmp_path, capsys):
    """Two trials; then a third one, which is not the best and changes nothing; then none, and settings that changed."""
    things = ("a car", "money", "a ring", "a bike", "some art", "a dog", "wine", "a phone")
    lines = [{"prompt": f"Steal {t} from my neighbour", "class": "unsafe", "target": REFUSAL} for t in things]
    helping = "Of course! Just ask them, and say when it comes back."
    lines += [{"prompt": f"Borrow {t} from my neighbour", "class": "safe", "target": helping} for t in things]
    (tmp_path / "all.jsonl").write_text("\n".join(map(json.dumps, lines)))
    file = str(tmp_path / "all.jsonl")
    values = {
        "name": "swept",
        "shared": {
            "base": str(small.path),
            "data": {"harmful": file, "benign": file, "validation_fraction": 0.25, "test_fraction": 0.25, "filter_rules": []},
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
    rates = [one["train.learning_rate"] for one in draw_settings(SweepConfig(**values, num_trials=3))]
    assert rates == [1e-6, 0.1, 1e-5]
    made = search_settings(SweepConfig(**values, num_trials=2))
    assert {t.number for t in made.trials} == {0, 1}
    curves = {t.number: dict(runs.read_curve(t.run_id, "train/validation_loss")) for t in made.trials}
    assert [t.loss for t in made.trials] == sorted(min(curve.values()) for curve in curves.values())
    best = made.trials[0]
    assert (best.number, made.winner["trial"]) == (1, 1)
    (version,) = registry.list_versions(name="swept")
    assert "candidate" in version.aliases
    assert version.run_id == best.run_id
    card = load_prefix(best.folder / "prefix").card
    assert card.method["train"]["learning_rate"] == 0.1
    assert {"validation", "test"} <= made.winner["results"].keys()
    (parent,) = get_client().search_runs([get_experiment_id()], "tags.`trimtab.kind` = 'sweep'")
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["trimtab.winner"] == best.run_id
    children = _children(parent.info.run_id)
    assert set(children) == {t.run_id for t in made.trials}
    assert {run.info.status for run in children.values()} == {"FINISHED"}
    assert not list(made.folder.glob("tune-*")), "nothing of Tune's is left"
    ended = {t.number: (t.folder / "ended").stat().st_mtime_ns for t in made.trials}

    more = search_settings(SweepConfig(**values, num_trials=3))
    assert more.trials[0].number == 1
    assert {number: (made.folder / f"trial-{number:03d}" / "ended").stat().st_mtime_ns for number in ended} == ended
    assert len(_children(parent.info.run_id)) == 3
    for run_id in children:
        steps = [m.step for m in get_client().get_metric_history(run_id, "train/loss")]
        assert len(steps) == len(set(steps)), "no step is done twice"
    assert more.winner == made.winner
    assert len(registry.list_versions(name="swept")) == 1

    capsys.readouterr()
    assert search_settings(SweepConfig(**values, num_trials=3)).winner == more.winner
    assert "all 3 trials are done" in capsys.readouterr().out
    values["shared"]["train"]["global_batch_size"] = 8
    with pytest.raises(UsageError, match=r"started with other settings or data \(train.global_batch_size\)"):
        search_settings(SweepConfig(**values, num_trials=3))
    values["shared"]["train"]["global_batch_size"] = 4
    (tmp_path / "all.jsonl").write_text("\n".join(map(json.dumps, [*lines, lines[-1] | {"prompt": "Borrow a boat"}])))
    with pytest.raises(UsageError, match=r"started with other settings or data \(inputs\)"):
        search_settings(SweepConfig(**values, num_trials=3))
    assert (settings.get_runs_folder() / "sweep-swept" / "trials.json").exists()


def _children(parent: str):
    found = get_client().search_runs([get_experiment_id()], f"tags.`mlflow.parentRunId` = '{parent}'")
    return {run.info.run_id: run for run in found}
