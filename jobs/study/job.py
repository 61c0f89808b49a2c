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
from trimtab.cli.console import console, say
from trimtab.data.prompt import Prompt
from trimtab.data.readers import read_all
from trimtab.errors import UsageError
from trimtab.evaluation import study_page
from trimtab.evaluation.safety import report
from trimtab.evaluation.safety import results as safety
from trimtab.evaluation.safety.results import ArmResult
from trimtab.evaluation.study_page import Study
from trimtab.evaluation.utility import report as utility_report
from trimtab.jobs.align import dataset
from trimtab.jobs.align.config import PARTED_BY, AlignConfig
from trimtab.jobs.align.dataset import Prepared
from trimtab.jobs.evaluate import utility, variants
from trimtab.jobs.evaluate.arm_cache import Store
from trimtab.jobs.evaluate.utility import Suite
from trimtab.jobs.judges import runner
from trimtab.jobs.runtime import run_state
from trimtab.jobs.runtime.cluster import joined
from trimtab.jobs.runtime.config import sources
from trimtab.jobs.study.arm_runs import ArmRun, Trained, train_all
from trimtab.jobs.study.baselines import build_baselines
from trimtab.jobs.study.config import StudyConfig
from trimtab.judges import Judge
from trimtab.judges.human_agreement import Standing
from trimtab.model import base_model
from trimtab.model.base_model import BaseModel
from trimtab.tracking import code_version, runs
from trimtab.util import atomic_files


@dataclass(frozen=True)
class Begun:
    """What a study stands on before anything is learned: its settings, those of each arm, and what judges."""

    config: StudyConfig
    plans: Mapping[str, AlignConfig]
    base: BaseModel
    suites: Mapping[str, Suite]
    judge: Judge
    standing: Standing
    folder: Path


def study(config: StudyConfig) -> Study:
    """Train and judge what is missing, and put all of it together. Raises errors of ours, Interrupted on Ctrl-C."""
    folder = settings.runs() / f"study-{config.name}"
    plans = {name: plan(config, name) for name in config.arms}
    first = next(iter(plans.values()))
    base = base_model.resolve(first.base, first.revision)
    if different := [name for name, p in plans.items() if (p.base, p.revision) != (first.base, first.revision)]:
        raise UsageError(f"arm {different[0]!r} is of another base model; a study compares ways to steer one")
    common = {name: [getattr(p.data, key) for key in PARTED_BY] for name, p in plans.items()}
    if different := [name for name, values in common.items() if values != common[first.name]]:
        raise UsageError(f"arm {different[0]!r} parts the prompts otherwise: data.{', data.'.join(PARTED_BY)} go into shared")
    folder.mkdir(parents=True, exist_ok=True)
    suites = {name: utility.load(suite, name) for name, suite in config.utility.items()}
    judge = runner.opened(config.judge, base, first.scale.gpus)
    begun = Begun(config, plans, base, suites, judge, runner.standing(judge), folder)
    with atomic_files.alone(folder), joined(config.address):
        prepared = dataset.each(plans, base)
        parent = _parent(config, folder)
        with runs.closing(parent):
            made = _compared(begun, prepared, parent)
            written = study_page.write(made, Path(config.out) if config.out else folder / "report")
            for path in written:
                parent.artifacts(path, "report")
    say(f"report: {written[0]}")
    return made


def command(config: StudyConfig) -> dict[str, Any]:
    """`trimtab study`."""
    made = study(config)
    for part, results in made.parts.items():
        console.print(report.table(results, f"{config.name}: {part}"))
        if made.judge:
            say(made.judge.line())
    for suite, measured in made.utility.items():
        for table in utility_report.tables(measured, f"{config.name}: utility on {suite}"):
            console.print(table)
    return study_page.as_json(made)


def _compared(begun: Begun, prepared: Mapping[str, Prepared], parent: runs.Run) -> Study:
    config, plans, base, folder = begun.config, begun.plans, begun.base, begun.folder
    first = next(iter(plans.values()))
    # Seed by seed, so that a study that is stopped has compared all arms as far as it went.
    planned = [ArmRun(_seeded(plans[name], seed), prepared[name], folder) for seed in config.seeds for name in config.arms]
    trained = train_all(planned, base, parent.run_id, config.parallel)
    chosen = {name: t.prefix for name, t in trained.items()} | build_baselines(
        config, first, base, prepared[first.name], folder
    )
    answered = _answers(first, base, chosen, _parts(config, first, prepared[first.name]), folder / "judged")
    results = runner.rejudged(answered, begun.judge, first.scale.gpus)
    made = _study(config, first, base, prepared[first.name], trained, results, begun.standing)
    if not begun.suites:
        return made
    everything, precision = variants.standard_arms(chosen), first.train.precision
    cost = utility.measure(base, everything, begun.suites, precision, first.scale.gpus, folder / "utility")
    parent.inputs([entry for name, suite in begun.suites.items() for entry in suite.inputs(name)], "utility")
    parent.metrics(utility_report.logged(cost), 0)
    return replace(made, utility=cost)


def plan(config: StudyConfig, arm: str) -> AlignConfig:
    """The settings of `trimtab align` that an arm is trained with. Raises UsageError for what they do not know."""
    values = runs.flatten(config.shared) | runs.flatten(config.arms[arm]) | {"name": arm, "register": False}
    return main.build(AlignConfig, values, f"arm {arm}")


def _seeded(plan: AlignConfig, seed: int) -> AlignConfig:
    return replace(plan, train=replace(plan.train, seed=seed))


def _parent(config: StudyConfig, folder: Path) -> runs.Run:
    run = run_state.join(folder, f"study {config.name}", "study")
    run.params(
        {
            "study": {
                "seeds": config.seeds,
                "arms": ", ".join(config.arms),
                "suites": ", ".join([*config.suites, *config.utility]),
            }
        }
    )
    return run


def _parts(config: StudyConfig, first: AlignConfig, prepared: Prepared) -> dict[str, list[Prompt]]:
    """Prompts to judge on: the test part, and each suite."""
    parts = {"test": variants.limited(prepared.parts["test"], first.evaluate.limit)}
    for name, suite in config.suites.items():
        parts[name] = variants.limited(read_all(sources(suite.data), suite.default_class, suite.columns), suite.limit)
    return parts


def _answers(
    first: AlignConfig, base: BaseModel, chosen: Mapping[str, Prefix], parts: Mapping[str, list[Prompt]], folder: Path
) -> dict[str, list[ArmResult]]:
    """Results of all arms on all parts; only what was not answered before is asked, of one engine."""
    everything = variants.standard_arms(chosen)
    tokens, precision = first.evaluate.max_tokens, first.train.precision
    stores = {part: Store(folder, base.fingerprint, prompts, tokens, precision) for part, prompts in parts.items()}
    variants.keep_answers(variants.TITLE, base, everything, list(stores.values()), first.scale.gpus)
    return {
        part: [safety.judged(arm, store.prompts, store.answers(arm) or []) for arm in everything]
        for part, store in stores.items()
    }


def _study(
    config: StudyConfig,
    first: AlignConfig,
    base: BaseModel,
    prepared: Prepared,
    trained: Mapping[str, Trained],
    results: Mapping[str, list[ArmResult]],
    standing: Standing,
) -> Study:
    return Study(
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
        + [code_version.line()],
    )
