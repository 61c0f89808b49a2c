"""Job of `trimtab study`: comparison of training methods on the same rows and prompts over several seeds.

trimtab study --config jobs/configs/study.yaml

Every arm and seed is a child run in MLflow, which is skipped if it is done. One engine then generates the answers of all arms,
and the answers are cached. A study can therefore be interrupted, resumed, and extended by arms or seeds.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trimtab import settings
from trimtab.artifacts.card import PrefixCondition
from trimtab.cli import main
from trimtab.cli.console import console, print_line
from trimtab.data.prompt import Prompt
from trimtab.data.readers import read_all_prompts
from trimtab.errors import UsageError
from trimtab.evaluation.safety.report import build_table
from trimtab.evaluation.safety.results import Arm, ArmResult, judge_answers
from trimtab.evaluation.study_page import StudyReport, report_as_json, write_report
from trimtab.evaluation.utility.report import build_tables, get_logged_metrics
from trimtab.jobs.align.config import PARTED_BY, AlignConfig
from trimtab.jobs.align.dataset import PreparedDataset, prepare_many
from trimtab.jobs.evaluate import utility
from trimtab.jobs.evaluate.arm_cache import ArmCache
from trimtab.jobs.evaluate.conditions import add_guarded_arms, apply_conditions
from trimtab.jobs.evaluate.utility import LoadedSuite
from trimtab.jobs.evaluate.variants import TITLE, build_engine_config, generate_missing, limit_prompts
from trimtab.jobs.judges.runner import apply_judge, compute_standing, open_judge
from trimtab.jobs.runtime.cluster import ray_session
from trimtab.jobs.runtime.config import as_source_list
from trimtab.jobs.runtime.run_state import create_or_resume_run
from trimtab.jobs.study.arm_runs import ArmRun, TrainedArm, train_arms
from trimtab.jobs.study.baselines import build_baselines, build_study_arms
from trimtab.jobs.study.config import StudyConfig
from trimtab.judges import Judge
from trimtab.judges.human_agreement import JudgeStanding
from trimtab.model.base_model import BaseModel, resolve_base_model
from trimtab.tracking import runs
from trimtab.tracking.code_version import format_code_version
from trimtab.util.atomic_files import exclusive_lock


@dataclass(frozen=True)
class StudySession:
    """Inputs of a study that are fixed before training.

    Attributes:
        config: settings of the study.
        plans: training settings of each arm, by arm name.
        base: base model of all arms.
        suites: loaded utility suites, by name.
        judge: judge of the answers.
        standing: agreement of the judge with human labels.
        folder: folder of the study.
    """

    config: StudyConfig
    plans: Mapping[str, AlignConfig]
    base: BaseModel
    suites: Mapping[str, LoadedSuite]
    judge: Judge
    standing: JudgeStanding
    folder: Path

    @property
    def first(self) -> AlignConfig:
        """Settings of the first arm, which set the base model, the evaluation and the data of the report."""
        return next(iter(self.plans.values()))


def compare_arms(config: StudyConfig) -> StudyReport:
    """Train and evaluate the missing arms and write the report.

    Returns:
        The report on all arms.

    Raises:
        TrimtabError: if the settings are invalid or a run fails.
        InterruptedByUserError: on Ctrl-C.
    """
    folder = settings.get_runs_folder() / f"study-{config.name}"
    plans = {name: build_arm_config(config, name) for name in config.arms}
    first = next(iter(plans.values()))
    base = resolve_base_model(first.base, first.revision)
    if different := [name for name, p in plans.items() if (p.base, p.revision) != (first.base, first.revision)]:
        raise UsageError(f"arm {different[0]!r} has another base model: all arms of a study must have the same")
    common = {name: [getattr(p.data, key) for key in PARTED_BY] for name, p in plans.items()}
    if different := [name for name, values in common.items() if values != common[first.name]]:
        raise UsageError(f"arm {different[0]!r} splits the prompts differently: set data.{', data.'.join(PARTED_BY)} in shared")
    folder.mkdir(parents=True, exist_ok=True)
    suites = {name: utility.load_suite(suite, name) for name, suite in config.utility.items()}
    judge = open_judge(config.judge, base, first.scale.gpus_per_worker)
    session = StudySession(config, plans, base, suites, judge, compute_standing(judge), folder)
    with exclusive_lock(folder), ray_session(config.address):
        prepared = prepare_many(plans, base)
        parent = _start_parent_run(config, folder)
        with runs.close_run(parent):
            report = _train_and_compare(session, prepared, parent)
            paths = write_report(report, Path(config.out) if config.out else folder / "report")
            for path in paths:
                parent.log_artifacts(path, "report")
    print_line(f"report: {paths[0]}")
    return report


def run_study(config: StudyConfig) -> dict[str, Any]:
    """Run `trimtab study` and print its tables.

    Returns:
        The report as JSON values.
    """
    report = compare_arms(config)
    for part, results in report.parts.items():
        console.print(build_table(results, f"{config.name}: {part}"))
        if report.judge:
            print_line(report.judge.format_line())
    for suite, measured in report.utility.items():
        for table in build_tables(measured, f"{config.name}: utility on {suite}"):
            console.print(table)
    return report_as_json(report)


def _train_and_compare(session: StudySession, prepared: Mapping[str, PreparedDataset], parent: runs.TrackedRun) -> StudyReport:
    config, plans, base, folder, first = session.config, session.plans, session.base, session.folder, session.first
    # Seed by seed, so that an interrupted study has trained all arms equally far.
    arms = [ArmRun(_with_seed(plans[name], seed), prepared[name], folder) for seed in config.seeds for name in config.arms]
    trained = train_arms(arms, base, parent.run_id, config.max_concurrent_runs)
    prefixes = {name: t.prefix for name, t in trained.items()} | build_baselines(
        config, first, base, prepared[first.name], folder
    )
    all_arms = build_study_arms(base, prefixes)
    answered = _answer_all(session, all_arms, _read_prompt_parts(config, first, prepared[first.name]))
    results = apply_judge(answered, session.judge, first.scale.gpus_per_worker)
    engine, gpus = build_engine_config(first.train.dtype), first.scale.gpus_per_worker
    if config.detector is not None:
        condition = PrefixCondition(config.detector, "above", config.threshold)
        results = add_guarded_arms(condition, base, results, trained, engine, gpus)
    results = apply_conditions(base, {name: t.prefix for name, t in trained.items()}, results, engine, gpus)
    report = _build_report(config, first, base, prepared[first.name], trained, results, session.standing)
    if not session.suites:
        return report
    cost = utility.measure_utility(base, all_arms, session.suites, first.train.dtype, gpus, folder / "utility")
    parent.log_inputs([entry for name, suite in session.suites.items() for entry in suite.inputs(name)], "utility")
    parent.log_metrics(get_logged_metrics(cost), 0)
    return replace(report, utility=cost)


def build_arm_config(config: StudyConfig, arm: str) -> AlignConfig:
    """Return the settings of `trimtab align` that train an arm.

    Raises:
        UsageError: if a setting is unknown or invalid.
    """
    values = runs.flatten_settings(config.shared) | runs.flatten_settings(config.arms[arm]) | {"name": arm, "register": False}
    return main.build_settings(AlignConfig, values, f"arm {arm}")


def _with_seed(plan: AlignConfig, seed: int) -> AlignConfig:
    return replace(plan, train=replace(plan.train, seed=seed))


def _start_parent_run(config: StudyConfig, folder: Path) -> runs.TrackedRun:
    run = create_or_resume_run(folder, f"study {config.name}", "study")
    run.log_params(
        {
            "study": {
                "seeds": config.seeds,
                "arms": ", ".join(config.arms),
                "suites": ", ".join([*config.suites, *config.utility]),
            }
        }
    )
    return run


def _read_prompt_parts(config: StudyConfig, first: AlignConfig, prepared: PreparedDataset) -> dict[str, list[Prompt]]:
    """Return the evaluation prompts: the test part and each suite."""
    parts = {"test": limit_prompts(prepared.parts["test"], first.evaluate.limit)}
    for name, suite in config.suites.items():
        parts[name] = limit_prompts(
            read_all_prompts(as_source_list(suite.data), suite.default_class, suite.columns), suite.limit
        )
    return parts


def _answer_all(session: StudySession, arms: Sequence[Arm], parts: Mapping[str, list[Prompt]]) -> dict[str, list[ArmResult]]:
    """Return the results of all arms on all parts.

    One engine generates the answers that are not cached, also those to the questions of the utility suites.
    """
    first, base = session.first, session.base
    tokens, dtype, folder = first.evaluate.max_tokens, first.train.dtype, session.folder / "judged"
    caches = {part: ArmCache(folder, base.fingerprint, prompts, tokens, dtype) for part, prompts in parts.items()}
    questions = utility.open_answer_caches(base, session.suites, dtype, session.folder / "utility")
    generate_missing(TITLE, base, arms, [*caches.values(), *questions.values()], first.scale.gpus_per_worker)
    return {
        part: [judge_answers(arm, cache.prompts, cache.read_answers(arm) or []) for arm in arms]
        for part, cache in caches.items()
    }


def _build_report(
    config: StudyConfig,
    first: AlignConfig,
    base: BaseModel,
    prepared: PreparedDataset,
    trained: Mapping[str, TrainedArm],
    results: Mapping[str, list[ArmResult]],
    standing: JudgeStanding,
) -> StudyReport:
    return StudyReport(
        title=f"{config.name}: prefixes for {base.name}",
        base=f"{base.name} {base.fingerprint}",
        parts=results,
        filter_table=prepared.filtered.table,
        form=prepared.form,
        curves={name: t.curve for name, t in trained.items()},
        costs=[t.cost for t in trained.values()],
        selected=[t.selected for t in trained.values()],
        judge=standing,
        notes=[f"{name}: {json.dumps(values)}" for name, values in config.arms.items() if values]
        + [
            f"{first.train.max_steps} steps of {first.train.global_batch_size} rows",
            "checkpoints chosen on the validation part only",
        ]
        + [format_code_version()],
    )
