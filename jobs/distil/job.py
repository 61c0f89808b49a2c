"""The distil job: system prompt -> user prompts -> answers of the teacher -> Ray Train -> evaluation -> registry -> gate.

Example:
    trimtab distil --system prompt.md --checks checks.yaml --name concise --num_virtual_tokens 16
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from trimtab.artifacts.prefix import Prefix, save_prefix
from trimtab.cli.console import console, print_line
from trimtab.evaluation.rules.rule_checks import Rule, read_rules
from trimtab.evaluation.rules.rule_results import SYSTEM_ARM, build_rule_table, results_as_json
from trimtab.evaluation.utility.report import build_tables, metrics_as_json
from trimtab.jobs.align.dataset import PreparedDataset, build_run_identity
from trimtab.jobs.align.driver import build_learned_prefix, check_completed, run_training
from trimtab.jobs.distil.config import DistilConfig
from trimtab.jobs.distil.dataset import SystemPrompt, describe_filter, prepare_dataset, read_system_prompt
from trimtab.jobs.distil.evaluation import DistilResults, check_gate, evaluate_prefix
from trimtab.jobs.runtime.cluster import ray_session
from trimtab.jobs.runtime.run_folders import DONE, choose_run_folder
from trimtab.jobs.runtime.run_state import create_or_resume_run
from trimtab.model.base_model import BaseModel, resolve_base_model
from trimtab.tracking import registry, runs
from trimtab.tracking.promotions import register_and_promote
from trimtab.tracking.registry import Version
from trimtab.tracking.runs import TrackedRun
from trimtab.types import BASE_ARM
from trimtab.util.atomic_files import exclusive_lock


@dataclass(frozen=True)
class DistilResult:
    """Result of a distil run.

    Attributes:
        folder: folder of the run, with prefix/ and report.json.
        run_id: id of the MLflow run.
        prefix: distilled prefix.
        results: evaluation against the system prompt.
        version: registered version, None if the prefix was not registered.
        champion: whether the version was promoted to champion.
    """

    folder: Path
    run_id: str
    prefix: Prefix
    results: DistilResults
    version: Version | None
    champion: bool


def distil(config: DistilConfig) -> DistilResult:
    """Compress a system prompt into a prefix, evaluate it and register it.

    Raises:
        TrimtabError: if the settings, the system prompt or the rules are invalid, or if the job fails.
        InterruptedByUserError: if the user stops training; it can be resumed.
    """
    rules = read_rules(Path(config.checks)) if config.checks else []
    print_line(f"base model {config.base}, and the prompts (downloaded and converted at the first use)")
    base = resolve_base_model(config.base, config.revision)
    registry.format_model_name(base.name, config.name)
    system = read_system_prompt(config, base)
    identity = build_run_identity(config.identity(), base, [{"name": "system prompt", "digest": system.digest}])
    folder = choose_run_folder(config.name, config.resume, identity)
    with exclusive_lock(folder), ray_session(config.scale.address):
        prepared = prepare_dataset(config, base, system, rules)
        run = create_or_resume_run(folder, config.name, "distil", config=identity)
        with runs.close_run(run):
            return _train_with_tracking(config, base, system, rules, prepared, run, folder)


def run_distil(config: DistilConfig) -> dict[str, Any]:
    """Run `trimtab distil` and return its `--json` output."""
    result = distil(config)
    print_line(f"prefix: {result.folder / 'prefix'}   report: {result.folder / 'report.json'}")
    about = {"folder": str(result.folder), "run_id": result.run_id, "name": config.name, "champion": result.champion}
    version = result.version.version if result.version else None
    return about | {"version": version, "results": report_as_json(result.results)}


def report_as_json(results: DistilResults) -> dict[str, Any]:
    """Convert evaluation results to JSON values."""
    return {
        "rules": results_as_json(results.rules),
        "adversarial": results_as_json(results.adversarial),
        "recovered": asdict(results.recovered) if results.recovered else None,
        "recovered_adversarial": asdict(results.recovered_adversarial) if results.recovered_adversarial else None,
        "extracted": dict(results.extracted),
        "divergence": {arm: asdict(value) for arm, value in results.divergence.items()},
        "utility": metrics_as_json(results.utility, answers=False) if results.utility else None,
    }


def print_report(results: DistilResults, system: SystemPrompt) -> None:
    """Print the tables of the evaluation."""
    name = results.name
    for verdicts, share, title in (
        (results.rules, results.recovered, "rules obeyed"),
        (results.adversarial, results.recovered_adversarial, "rules obeyed, adversarial user"),
    ):
        if verdicts:
            console.print(build_rule_table(verdicts, title))
            print_line(
                f"{title}: {name} has {share} of the gain of the system prompt"
                if share
                else f"{title}: the system prompt improves no rule by 20 points. It has no clear effect on this model"
            )
    table = Table("arm", "KL from the system prompt, nats per token", "extracted share of it", title=f"{system.tokens} tokens")
    for arm in (BASE_ARM, SYSTEM_ARM, name):
        divergence = results.divergence.get(arm)
        table.add_row(arm, str(divergence) if divergence else "0", f"{results.extracted[arm]:.2f}")
    console.print(table)
    for built in build_tables(results.utility, "utility") if results.utility else ():
        console.print(built)


def _train_with_tracking(
    config: DistilConfig,
    base: BaseModel,
    system: SystemPrompt,
    rules: Sequence[Rule],
    prepared: PreparedDataset,
    run: TrackedRun,
    folder: Path,
) -> DistilResult:
    plan = config.build_align_config()
    run.log_params({"config": asdict(config), "base_fingerprint": base.fingerprint, "system_tokens": system.tokens})
    run.log_inputs(prepared.inputs, "training")
    (folder / "filter.json").write_text(json.dumps(describe_filter(prepared.filtered.table), indent=2) + "\n")
    run.log_artifacts(folder / "filter.json", "data")
    training = run_training(plan, base, prepared, run, folder)
    check_completed(training, config.train.max_steps)
    draft = build_learned_prefix(plan, base, prepared, run, training)
    results = evaluate_prefix(config, base, system, rules, prepared.parts["test"], draft)
    metrics = list_metrics(results)
    prefix = build_learned_prefix(plan, base, prepared, run, training, metrics)
    save_prefix(prefix, folder / "prefix")
    (folder / "report.json").write_text(json.dumps(report_as_json(results), indent=1) + "\n")
    run.log_artifacts(folder / "report.json", "evaluation")
    run.log_metrics(metrics, config.train.max_steps)
    print_report(results, system)
    version, champion = _register_prefix(config, base, results, run, folder) if config.register else (None, False)
    (folder / DONE).touch()
    return DistilResult(folder, run.run_id, prefix, results, version, champion)


def list_metrics(results: DistilResults) -> dict[str, float]:
    """Return the metrics of a prefix for its card and run."""
    metrics = {"divergence": results.divergence[results.name].value, "divergence_base": results.divergence[BASE_ARM].value}
    shares = {"recovered": results.recovered, "recovered_adversarial": results.recovered_adversarial}
    metrics |= {key: share.value for key, share in shares.items() if share is not None}
    return metrics | {"extracted": results.extracted[results.name]}


def _register_prefix(
    config: DistilConfig, base: BaseModel, results: DistilResults, run: TrackedRun, folder: Path
) -> tuple[Version, bool]:
    is_first = registry.find_champion(base.name, config.name) is None
    decision = check_gate(config.gate, results, is_first=is_first)
    version = register_and_promote(folder / "prefix", run, decision.passed, decision.reason)
    print_line(f"registered {config.name} version {version.version} as candidate; gate: {decision.reason}")
    return version, decision.passed
