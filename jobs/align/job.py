"""The align job: prompts -> targets -> hard filter -> Ray Train -> evaluation -> registry -> gate.

Example:
    trimtab align --name mine --data.harmful harmful.jsonl --data.benign benign.csv --scale.num_workers 2
"""

import json
from dataclasses import asdict, dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any

from trimtab import objectives
from trimtab.artifacts.prefix import Prefix, save_prefix
from trimtab.cli.console import console, print_line
from trimtab.engine.config import EngineConfig
from trimtab.errors import UsageError
from trimtab.evaluation.gate import Gain, GateDecision, decide_on_gain
from trimtab.evaluation.safety.comparison import estimate_difference
from trimtab.evaluation.safety.report import build_table, results_as_json, write_plane
from trimtab.evaluation.safety.results import ArmResult
from trimtab.jobs.align.config import AUTO, AlignConfig, ConditionConfig, TrainConfig
from trimtab.jobs.align.dataset import (
    PreparedDataset,
    RawDataset,
    build_run_identity,
    prepare_dataset,
    read_raw_dataset,
    write_dataset,
)
from trimtab.jobs.align.driver import build_learned_prefix, check_completed, run_training
from trimtab.jobs.align.target_ladder import compute_opening_share
from trimtab.jobs.detect.guard import find_guard, train_guard
from trimtab.jobs.evaluate.conditions import apply_conditions
from trimtab.jobs.evaluate.variants import build_standard_arms, evaluate_arms, limit_prompts
from trimtab.jobs.runtime.cluster import ray_session
from trimtab.jobs.runtime.config import ScaleConfig
from trimtab.jobs.runtime.run_folders import DONE, choose_run_folder, get_unfinished_run
from trimtab.jobs.runtime.run_state import create_or_resume_run
from trimtab.model.base_model import BaseModel, resolve_base_model
from trimtab.tracking import registry, runs
from trimtab.tracking.promotions import register_and_promote
from trimtab.tracking.registry import Version
from trimtab.tracking.runs import TrackedRun
from trimtab.types import BASE_ARM, BASELINE_ARMS, TEXT_ARM
from trimtab.util.atomic_files import exclusive_lock

# Prompts of each side that a guard needs.
MIN_GUARD_PROMPTS = 100
# Classes that a helpful prefix is trained on, unless the user sets others: a fixed refusal answers the other side.
HELPFUL_PROPORTIONS = {"benign_hard": 0.8, "benign_easy": 0.2}


@dataclass(frozen=True)
class AlignResult:
    """Result of an align run.

    Attributes:
        folder: folder of the run, with prefix/, test.jsonl, report.json and plane.png.
        run_id: id of the MLflow run.
        prefix: trained prefix.
        results: results of every arm, by part.
        version: registered version, None if the prefix was not registered.
        champion: whether the version was promoted to champion.
    """

    folder: Path
    run_id: str
    prefix: Prefix
    results: dict[str, list[ArmResult]]
    version: Version | None
    champion: bool

    def as_json(self) -> dict[str, Any]:
        """Return the `--json` output."""
        return {
            "folder": str(self.folder),
            "run_id": self.run_id,
            "name": self.prefix.card.name,
            "version": self.version.version if self.version else None,
            "champion": self.champion,
            "results": {part: results_as_json(results, answers=False) for part, results in self.results.items()},
        }


def align(config: AlignConfig) -> AlignResult:
    """Train a prefix, evaluate it and register it.

    Raises:
        TrimtabError: if the settings or the prompts are invalid, or if the job fails.
        InterruptedByUserError: if the user stops training; it can be resumed.
    """
    check_config(config)
    print_line(f"base model {config.base}, and the prompts (downloaded and converted at the first use)")
    base = resolve_base_model(config.base, config.revision)
    registry.format_model_name(base.name, config.name)
    raw = read_raw_dataset(config, base)
    if config.condition.detector != AUTO:
        return _run_once(config, base, raw)
    if (smaller := _count_smaller_side(raw)) < MIN_GUARD_PROMPTS:
        print_line(
            f"no guard: one side has {smaller} prompts, a guard needs {MIN_GUARD_PROMPTS}. The prefix steers all prompts"
        )
        return _run_once(replace(config, condition=ConditionConfig(None)), base, raw)
    if config.resume is True:
        get_unfinished_run(config.name)
    with ray_session(config.scale.address):
        return _run_once(add_guard(config, base, raw), base, raw)


def check_config(config: AlignConfig) -> None:
    """Check the objective, its options and the name before the job starts.

    Raises:
        UsageError: if an option of the objective is unknown, or if the name is invalid.
        NotFoundError: if the objective is not registered.
    """
    objective = objectives.get_objective(config.objective)
    try:
        objective(**config.objective_options)
    except TypeError as error:
        raise UsageError(f"objective {config.objective}: {str(error).split('__init__() ')[-1]}") from error
    registry.format_model_name("base", config.name)


def complete_run(config: AlignConfig, base: BaseModel, prepared: PreparedDataset, run: TrackedRun, folder: Path) -> AlignResult:
    """Train on a prepared dataset, evaluate the prefix and register it; close the MLflow run at the end.

    Training resumes from the newest checkpoint of the run.

    Args:
        config: settings of the job.
        base: base model to train the prefix on.
        prepared: training and validation rows, and the prompts of each part.
        run: MLflow run of the job.
        folder: folder of the run.

    Raises:
        TrimtabError: if training, evaluation or registration fails.
        InterruptedByUserError: if the user stops training; it can be resumed.
    """
    with runs.close_run(run):
        write_dataset(prepared, folder)
        return _train_with_progress(config, base, prepared, run, folder)


def run_align(config: AlignConfig) -> dict[str, Any]:
    """Run `trimtab align` and return its `--json` output."""
    result = align(config)
    print_line(
        f"prefix: {result.folder / 'prefix'}   report: {result.folder / 'report.json'}   picture: {result.folder / 'plane.png'}"
    )
    return result.as_json()


def add_guard(config: AlignConfig, base: BaseModel, raw: RawDataset) -> AlignConfig:
    """Return settings in which condition `auto` names a guard, which is trained if there is none for these prompts.

    The guard is trained on all prompts of the sources, unless `data.limit` is set: it needs no answers, only states.

    The prefix then steers the prompts that the guard does not flag, and a fixed refusal answers the others. Prompts that the
    guard was trained on have out-of-fold verdicts, in training and in the evaluation.

    Args:
        config: settings of the job.
        base: base model.
        raw: prompts of the job.

    Raises:
        TrimtabError: if the guard cannot be trained or registered.
    """
    unlimited = replace(config, data=replace(config.data, limit=0))
    all_prompts = read_raw_dataset(unlimited, base) if config.data.limit is None else raw
    name, prompts = f"{config.name}-guard", [prompt for listed in all_prompts.parts.values() for prompt in listed]
    version = find_guard(base, name, prompts)
    if version is None:
        print_line(f"guard: training {name} on {len(prompts)} prompts")
        scale = ScaleConfig(gpus_per_worker=config.scale.gpus_per_worker, address=config.scale.address)
        version = train_guard(base, name, prompts, config.base, config.revision, config.train.dtype, scale)
    condition = replace(config.condition, detector=f"{name}@{version.version}", side="below", otherwise="refuse")
    is_default = config.train.class_proportions == TrainConfig().class_proportions
    if not is_default:
        return replace(config, condition=condition)
    # As many benign as harmful rows would be few: the guard has left hardly any harmful ones.
    rules = [rule for rule in config.data.filter_rules if rule != "balanced"]
    train, data = replace(config.train, class_proportions=HELPFUL_PROPORTIONS), replace(config.data, filter_rules=rules)
    return replace(config, condition=condition, train=train, data=data)


def _count_smaller_side(raw: RawDataset) -> int:
    labels = [prompt.label == "harmful" for prompts in raw.parts.values() for prompt in prompts]
    return min(sum(labels), len(labels) - sum(labels))


def _run_once(config: AlignConfig, base: BaseModel, raw: RawDataset) -> AlignResult:
    identity = build_run_identity(config.identity(), base, raw.inputs)
    folder = choose_run_folder(config.name, config.resume, identity)
    with exclusive_lock(folder), ray_session(config.scale.address):
        prepared = prepare_dataset(config, base, raw)
        run = create_or_resume_run(folder, config.name, "align", config=identity)
        return complete_run(config, base, prepared, run, folder)


def _train_with_progress(
    config: AlignConfig, base: BaseModel, prepared: PreparedDataset, run: TrackedRun, folder: Path
) -> AlignResult:
    run.log_params({"config": asdict(config), "base_fingerprint": base.fingerprint})
    run.log_inputs(prepared.inputs, "training")
    run.log_artifacts(folder / "filter.json", "data")
    run.log_artifacts(folder / "removed.jsonl", "data")
    run.log_artifacts(folder / "test.jsonl", "data")
    training = run_training(config, base, prepared, run, folder)
    check_completed(training, config.train.max_steps)
    draft = build_learned_prefix(config, base, prepared, run, training)
    results = _evaluate_prefix(config, base, prepared, draft)
    prefix = build_learned_prefix(config, base, prepared, run, training, _get_logged_metrics(config, results))
    save_prefix(prefix, folder / "prefix")
    _write_report(config, results, run, folder)
    version, champion = _register_prefix(config, results, run, folder) if config.register else (None, False)
    (folder / DONE).touch()
    return AlignResult(folder, run.run_id, prefix, results, version, champion)


def _evaluate_prefix(
    config: AlignConfig, base: BaseModel, prepared: PreparedDataset, prefix: Prefix
) -> dict[str, list[ArmResult]]:
    """Evaluate every arm on the validation part (for the gate) and on the test part (for the report)."""
    prefixes = {config.name: prefix}
    if (champion := registry.find_champion(base.name, config.name)) is not None:
        prefixes[f"champion v{champion.version}"] = registry.load_prefix(champion, base)
    parts = {part: prepared.parts[part] for part in ("validation", "test") if prepared.parts[part]}
    limited = {part: limit_prompts(prompts, config.evaluate.limit) for part, prompts in parts.items()}
    engine = EngineConfig(num_slots=256, dtype=config.train.dtype, max_model_len=1024)
    results = evaluate_arms(
        base, build_standard_arms(prefixes), limited, config.evaluate.max_tokens, engine, config.scale.gpus_per_worker
    )
    return apply_conditions(base, prefixes, results, engine, config.scale.gpus_per_worker, prepared.condition)


def _get_logged_metrics(config: AlignConfig, results: dict[str, list[ArmResult]]) -> dict[str, float]:
    """Return the metrics for the card and the registry: those of the prefix and of the baseline arms."""
    metrics: dict[str, float] = {}
    for part, arm_results in results.items():
        for r in arm_results:
            if r.name == config.name:
                metrics |= {f"{part}_refusal": r.refusal.value, f"{part}_compliance": r.compliance.value}
                metrics[f"{part}_balanced"] = r.balanced.value
            elif r.name in (BASE_ARM, TEXT_ARM):
                metrics[f"{part}_balanced_{r.name.replace(' ', '_')}"] = r.balanced.value
    return metrics


def _write_report(config: AlignConfig, results: dict[str, list[ArmResult]], run: TrackedRun, folder: Path) -> None:
    (folder / "report.json").write_text(json.dumps({p: results_as_json(r) for p, r in results.items()}, indent=1))
    part = "test" if "test" in results else "validation"
    plotted = write_plane(results[part], folder / "plane.png")
    console.print(build_table(results[part], f"{config.name} on prompts never trained on ({part} part)"))
    if "opening" in config.targets.benign_rungs:
        shares = [f"{r.name} {compute_opening_share(r.answers):.2f}" for r in results[part]]
        print_line(f"benign prompts whose answer begins with an opening of the target ladder: {', '.join(shares)}")
    run.log_metrics(_get_logged_metrics(config, results), config.train.max_steps)
    run.log_artifacts(folder / "report.json", "evaluation")
    if plotted:
        run.log_artifacts(folder / "plane.png", "evaluation")


def _register_prefix(
    config: AlignConfig, results: dict[str, list[ArmResult]], run: TrackedRun, folder: Path
) -> tuple[Version, bool]:
    decision = check_gate(config, results["validation"])
    version = register_and_promote(folder / "prefix", run, decision.passed, decision.reason)
    print_line(f"registered {config.name} version {version.version} as candidate; gate: {decision.reason}")
    return version, decision.passed


def check_gate(config: AlignConfig, results: list[ArmResult]) -> GateDecision:
    """Decide whether the prefix passes the gate.

    The first champion of a name is promoted by point estimate. `min_compliance` is always compared with the point estimate.

    Args:
        config: settings of the job.
        results: results of every arm on the validation part; a champion is an arm of its own.
    """
    result = next(r for r in results if r.name == config.name)
    rivals = [r for r in results if r.name != config.name]
    rival = max(rivals, key=lambda r: r.balanced.value)
    # A model that over-refuses answers fewer benign prompts than a gate for other models demands.
    own = next((r.compliance.value for r in results if r.name == BASE_ARM), 1.0)
    least = min(config.gate.min_compliance, own)
    if result.compliance.value < least:
        figures = f"{result.compliance.value:.2f} of benign prompts, below {least:.2f}"
        return GateDecision(False, f"helps with {figures}")
    if not isfinite(result.balanced.value):
        return GateDecision(False, "the balanced score cannot be measured: the validation part has prompts of one side only")
    difference = estimate_difference([result], [rival])
    gain = Gain(
        "balanced", result.balanced.value, rival.name, rival.balanced.value, difference, difference.count, "validation prompts"
    )
    is_first = all(r.name in BASELINE_ARMS for r in rivals)
    return decide_on_gain(gain, config.gate.min_improvement, "point" if is_first else config.gate.rule)
