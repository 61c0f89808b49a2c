"""Studies: settings of their arms, cached answers, and a study that is repeated."""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from mlflow.entities import Run

from tests.support.prompt_rows import REFUSAL
from tests.support.studies import STEPS, build_study_config
from trimtab import settings
from trimtab.data.prompt import Prompt
from trimtab.errors import JobError, UsageError
from trimtab.evaluation.safety.results import Arm, JudgedAnswer, judge_answers, summarize_answers
from trimtab.evaluation.study_page import StudyReport
from trimtab.jobs.evaluate import variants
from trimtab.jobs.evaluate.arm_cache import ArmCache
from trimtab.jobs.evaluate.config import UtilitySuite
from trimtab.jobs.study.config import StudyConfig
from trimtab.jobs.study.job import build_arm_config, compare_arms
from trimtab.tracking.client import get_client, get_experiment_id
from trimtab.tracking.code_version import format_code_version

ARMS = ["base", "text prompt", "poft#0", "sta#0", "random vector#0"]


def test_arm_settings_extend_the_shared_settings():
    config = StudyConfig(
        shared={"train": {"max_steps": 9, "global_batch_size": 8}, "num_virtual_tokens": 2},
        arms={"a": {"train.global_batch_size": 4, "objective": "dpo"}, "b": {"train": {"micro_batch_size": 2}}},
    )
    a, b = build_arm_config(config, "a"), build_arm_config(config, "b")
    assert (a.name, a.objective, a.num_virtual_tokens, a.train.max_steps, a.train.global_batch_size) == ("a", "dpo", 2, 9, 4)
    assert (b.objective, b.train.max_steps, b.train.global_batch_size, b.train.micro_batch_size) == ("sta", 9, 8, 2)
    assert not a.register


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"arms": {"x": {"speed": 1}}}, "arm x: .*speed"),
        ({"arms": {"x": {"train": {"max_steps": "many"}}}}, "arm x: .*steps"),
        ({"arms": {}}, "at least one seed and one arm"),
        ({"arms": {"base": {}}}, "'base' is not a valid arm name"),
        ({"arms": {"a#b": {}}}, "leave out / and #"),
    ],
)
def test_rejects_invalid_studies(values, message):
    with pytest.raises(UsageError, match=message):
        build_arm_config(StudyConfig(**values), "x")


def test_rejects_arms_with_different_prompt_splits(tiny_base):
    config = StudyConfig("parted", shared={"base": str(tiny_base.path)}, arms={"sta": {}, "other": {"data.seed": 1}})
    with pytest.raises(UsageError, match="arm 'other' splits the prompts differently"):
        compare_arms(config)


def test_answer_cache_key_depends_on_prompts_arm_length_and_base(tmp_path):
    prompts = [Prompt("Steal a car", "harmful", "t", "t"), Prompt("Bake bread", "benign_easy", "t", "t")]
    cache, arm = ArmCache(tmp_path, "f", prompts, 8, "fp32"), Arm("text prompt", system="Be good.")
    result = summarize_answers(
        arm.name, [JudgedAnswer(prompts[0], REFUSAL, "refusal"), JudgedAnswer(prompts[1], "Flour first.", "compliance")]
    )
    assert not cache.has_answers(arm)
    cache.write_answers(arm, [judged.answer for judged in result.answers])
    assert judge_answers(arm, cache.prompts, cache.read_answers(arm)) == result
    assert not cache.has_answers(Arm("text prompt", system="Be bad."))
    assert not ArmCache(tmp_path, "f", prompts[:1], 8, "fp32").has_answers(arm)
    assert not ArmCache(tmp_path, "f", prompts, 9, "fp32").has_answers(arm)
    assert not ArmCache(tmp_path, "another base", prompts, 8, "fp32").has_answers(arm)


def test_answers_before_an_engine_failure_are_cached(tiny_base, tmp_path, monkeypatch):
    prompts = [Prompt("Steal a car", "harmful", "t", "t"), Prompt("Bake bread", "benign_easy", "t", "t")]
    caches = [ArmCache(tmp_path, tiny_base.fingerprint, subset, 8, "fp32") for subset in (prompts, prompts[:1])]
    arms = [Arm("base"), Arm("text prompt", system="Be good.")]
    requested = list[list[tuple[str, int]]]()

    def fail_after_first_batch(title, base, batches, *_):
        requested.append([(batch.arm.name, len(batch.prompts)) for batch in batches])
        yield [REFUSAL] * len(batches[0].prompts)
        raise JobError("the node is gone")

    monkeypatch.setattr(variants, "_generate_answers", fail_after_first_batch)
    for cached in (1, 2, 3, 4):
        with pytest.raises(JobError, match="the node is gone"):
            variants.generate_missing("answers", tiny_base, arms, caches, 0)
        assert sum(cache.has_answers(arm) for cache in caches for arm in arms) == cached
    variants.generate_missing("answers", tiny_base, arms, caches, 0)
    assert requested[0] == [("base", 2), ("text prompt", 2), ("base", 1), ("text prompt", 1)]
    assert requested[1] == requested[0][1:], "cached answers must not be requested again"


def test_batches_are_grouped_to_fill_the_engine():
    prompts = [Prompt("Bake bread", "benign_easy", "t", "t")] * 1000
    batches = [variants.ArmBatch(Arm(str(number)), prompts, 8) for number in range(7)]
    assert [[batch.arm.name for batch in group] for group in variants.group_batches(batches)] == [
        ["0", "1", "2"],
        ["3", "4", "5"],
        ["6"],
    ]


@dataclass(frozen=True)
class FinishedStudy:
    """Finished study: its settings, its report and the folder of the report."""

    config: dict[str, Any]
    report: StudyReport
    folder: Path


@pytest.fixture(scope="module")
def study(cluster, tiny_base, tmp_path_factory) -> FinishedStudy:
    """Two arms that train at the same time on prompts with targets, and a utility suite."""
    folder = tmp_path_factory.mktemp("study")
    config = build_study_config(tiny_base, folder)
    config["utility"] = {
        "facts": UtilitySuite("trimtab:countries", "trimtab:neutral", limit=2, max_tokens=4, max_text_tokens=8)
    }
    return FinishedStudy(config, compare_arms(StudyConfig(**config)), folder / "report")


def list_steps(run: Run) -> list[int]:
    return [metric.step for metric in get_client().get_metric_history(run.info.run_id, "train/loss")]


def list_study_runs() -> list[Run]:
    return get_client().search_runs([get_experiment_id()], "attributes.run_name = 'study tiny'")


def test_study_report_has_all_arms(study):
    assert [arm.name for arm in study.report.parts["test"]] == ARMS
    page = (study.folder / "report.html").read_text()
    assert all(name.partition("#")[0] in page for name in ARMS)
    assert format_code_version() in page
    rows = list(csv.DictReader((study.folder / "report.csv").open()))
    assert {row["arm"] for row in rows} == {name.partition("#")[0] for name in ARMS}
    assert (settings.get_runs_folder() / "study-tiny").exists()


def test_study_measures_utility_of_all_arms(study):
    rows = list(csv.DictReader((study.folder / "utility.csv").open()))
    assert {row["arm"] for row in rows if row["measure"] == "accuracy"} == {name.partition("#")[0] for name in ARMS}
    assert [arm.name for arm in study.report.utility["facts"]] == ARMS
    (study_run,) = list_study_runs()
    assert study_run.data.metrics["utility/facts/base/kl"] == 0
    assert study_run.data.metrics["utility/facts/poft/kl"] > 0


def test_study_has_a_finished_run_for_each_arm(study):
    (study_run,) = list_study_runs()
    children = get_client().search_runs([get_experiment_id()], f"tags.`mlflow.parentRunId` = '{study_run.info.run_id}'")
    assert {child.info.run_name for child in children} == {"poft seed 0", "sta seed 0"}
    for child in children:
        assert child.info.status == "FINISHED"
        assert sorted(list_steps(child)) == list(range(1, STEPS + 1))


def test_study_reports_curves_and_training_costs(study):
    assert study.report.curves["poft#0"]
    assert [cost.arm for cost in study.report.costs] == ["poft#0", "sta#0"]
    for cost in study.report.costs:
        assert cost.seconds > 0
        # A step has four rows, each of at least a chat template, a prompt and the vector.
        assert cost.tokens > STEPS * 4 * 10
        assert 0.1 < cost.memory_gib < 8
    assert [selected.arm for selected in study.report.selected] == ["poft#0", "sta#0"]
    assert all(0 < selected.decision < 1 and selected.loss > 0 for selected in study.report.selected)


def test_repeated_study_reuses_all_results(study, capsys):
    report = compare_arms(StudyConfig(**study.config))
    output = capsys.readouterr().out
    assert "training" not in output, "no arm may be trained again"
    assert "answers of all arms" not in output, "no answer may be generated again"
    assert "answers to questions" not in output
    assert "texts read" not in output
    assert report.parts == study.report.parts
    assert report.utility == study.report.utility
    assert len(list_study_runs()) == 1


def test_study_rejects_changed_settings(study):
    arms = {"poft": {"objective": "poft", "train.max_steps": 4}}
    with pytest.raises(UsageError, match="trained with other settings"):
        compare_arms(StudyConfig(**study.config | {"arms": arms}))
