"""`trimtab study`: ways to learn a prefix compared on the same rows and the same prompts, over several seeds, in one report.

trimtab study --config jobs/configs/study.yaml

Every arm and seed is a training run of its own (a child run in MLflow) that is skipped when it is there already; all arms are
then answered by one engine, and judged arms are kept too. So a study can be stopped, resumed, and given more arms or seeds.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trimtab import settings
from trimtab.artifacts.prefix import Prefix
from trimtab.cli import main
from trimtab.cli.console import console, print_line
from trimtab.data.prompt import Prompt
from trimtab.data.readers import read_all_prompts
from trimtab.errors import UsageError
from trimtab.evaluation.safety.report import build_table
from trimtab.evaluation.safety.results import ArmResult, judge_answers
from trimtab.evaluation.study_page import StudyReport, report_as_json, write_report
from trimtab.evaluation.utility.report import build_tables, get_logged_metrics
from trimtab.jobs.align.config import PARTED_BY, AlignConfig
from trimtab.jobs.align.dataset import PreparedDataset, prepare_many
from trimtab.jobs.evaluate import utility
from trimtab.jobs.evaluate.arm_cache import ArmCache
from trimtab.jobs.evaluate.utility import LoadedSuite
from trimtab.jobs.evaluate.variants import TITLE, build_standard_arms, generate_missing, limit_prompts
from trimtab.jobs.judges.runner import apply_judge, compute_standing, open_judge
from trimtab.jobs.runtime.cluster import ray_session
from trimtab.jobs.runtime.config import as_source_list
from trimtab.jobs.runtime.run_state import create_or_resume_run
from trimtab.jobs.study.arm_runs import ArmRun, TrainedArm, train_arms
from trimtab.jobs.study.baselines import build_baselines
from trimtab.jobs.study.config import StudyConfig
from trimtab.judges import Judge
from trimtab.judges.human_agreement import JudgeStanding
from trimtab.model.base_model import BaseModel, resolve_base_model
from trimtab.tracking import runs
from trimtab.tracking.code_version import format_code_version
from trimtab.util.atomic_files import exclusive_lock


@dataclass(frozen=True)
class StudySession:
    """What a study stands on before anything is learned: its settings, those of each arm, and what judges."""

    config: StudyConfig
    plans: Mapping[str, AlignConfig]
    base: BaseModel
    suites: Mapping[str, LoadedSuite]
    judge: Judge
    standing: JudgeStanding
    folder: Path


def compare_arms(config: StudyConfig) -> StudyReport:
    """Train and judge what is missing, and put all of it together. Raises errors of ours, Interrupted on Ctrl-C."""
    folder = settings.get_runs_folder() / f"study-{config.name}"
    plans = {name: build_arm_config(config, name) for name in config.arms}
    first = next(iter(plans.values()))
    base = resolve_base_model(first.base, first.revision)
    if different := [name for name, p in plans.items() if (p.base, p.revision) != (first.base, first.revision)]:
        raise UsageError(f"arm {different[0]!r} is of another base model; a study compares ways to steer one")
    common = {name: [getattr(p.data, key) for key in PARTED_BY] for name, p in plans.items()}
    if different := [name for name, values in common.items() if values != common[first.name]]:
        raise UsageError(f"arm {different[0]!r} parts the prompts otherwise: data.{', data.'.join(PARTED_BY)} go into shared")
    folder.mkdir(parents=True, exist_ok=True)
    suites = {name: utility.load_suite(suite, name) for name, suite in config.utility.items()}
    judge = open_judge(config.judge, base, first.scale.gpus)
    begun = StudySession(config, plans, base, suites, judge, compute_standing(judge), folder)
    with exclusive_lock(folder), ray_session(config.address):
        prepared = prepare_many(plans, base)
        parent = _start_parent_run(config, folder)
        with runs.close_run(parent):
            made = _train_and_compare(begun, prepared, parent)
            written = write_report(made, Path(config.out) if config.out else folder / "report")
            for path in written:
                parent.log_artifacts(path, "report")
    print_line(f"report: {written[0]}")
    return made


def run_study(config: StudyConfig) -> dict[str, Any]:
    """`trimtab study`."""
    made = compare_arms(config)
    for part, results in made.parts.items():
        console.print(build_table(results, f"{config.name}: {part}"))
        if made.judge:
            print_line(made.judge.format_line())
    for suite, measured in made.utility.items():
        for table in build_tables(measured, f"{config.name}: utility on {suite}"):
            console.print(table)
    return report_as_json(made)


def _train_and_compare(begun: StudySession, prepared: Mapping[str, PreparedDataset], parent: runs.TrackedRun) -> StudyReport:
    config, plans, base, folder = begun.config, begun.plans, begun.base, begun.folder
    first = next(iter(plans.values()))
    # Seed by seed, so that a study that is stopped has compared all arms as far as it went.
    planned = [ArmRun(_with_seed(plans[name], seed), prepared[name], folder) for seed in config.seeds for name in config.arms]
    trained = train_arms(planned, base, parent.run_id, config.parallel)
    chosen = {name: t.prefix for name, t in trained.items()} | build_baselines(
        config, first, base, prepared[first.name], folder
    )
    answered = _answer_all(first, base, chosen, _read_prompt_parts(config, first, prepared[first.name]), folder / "judged")
    results = apply_judge(answered, begun.judge, first.scale.gpus)
    made = _build_report(config, first, base, prepared[first.name], trained, results, begun.standing)
    if not begun.suites:
        return made
    everything, precision = build_standard_arms(chosen), first.train.precision
    cost = utility.measure_utility(base, everything, begun.suites, precision, first.scale.gpus, folder / "utility")
    parent.log_inputs([entry for name, suite in begun.suites.items() for entry in suite.inputs(name)], "utility")
    parent.log_metrics(get_logged_metrics(cost), 0)
    return replace(made, utility=cost)


def build_arm_config(config: StudyConfig, arm: str) -> AlignConfig:
    """The settings of `trimtab align` that an arm is trained with. Raises UsageError for what they do not know."""
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
    """Prompts to judge on: the test part, and each suite."""
    parts = {"test": limit_prompts(prepared.parts["test"], first.evaluate.limit)}
    for name, suite in config.suites.items():
        parts[name] = limit_prompts(
            read_all_prompts(as_source_list(suite.data), suite.default_class, suite.columns), suite.limit
        )
    return parts


def _answer_all(
    first: AlignConfig, base: BaseModel, chosen: Mapping[str, Prefix], parts: Mapping[str, list[Prompt]], folder: Path
) -> dict[str, list[ArmResult]]:
    """Results of all arms on all parts; only what was not answered before is asked, of one engine."""
    everything = build_standard_arms(chosen)
    tokens, precision = first.evaluate.max_tokens, first.train.precision
    stores = {part: ArmCache(folder, base.fingerprint, prompts, tokens, precision) for part, prompts in parts.items()}
    generate_missing(TITLE, base, everything, list(stores.values()), first.scale.gpus)
    return {
        part: [judge_answers(arm, store.prompts, store.read_answers(arm) or []) for arm in everything]
        for part, store in stores.items()
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
        judge=standing,
        notes=[f"{name}: {json.dumps(changed)}" for name, changed in config.arms.items() if changed]
        + [f"{first.train.steps} steps of {first.train.batch} rows; checkpoints chosen on the validation part only"]
        + [format_code_version()],
    )
