"""`trimtab evaluate safety`: refusal and compliance on any prompt files, for the base, a text prompt and prefixes."""

import json
from pathlib import Path
from typing import Any

from trimtab.cli.console import console, print_line
from trimtab.data.readers import read_all_prompts
from trimtab.evaluation.safety.report import build_table, results_as_json, write_plane
from trimtab.evaluation.safety.results import ArmResult
from trimtab.jobs.evaluate.config import SafetyConfig
from trimtab.jobs.evaluate.variants import build_engine_config, build_standard_arms, evaluate_arms, limit_prompts
from trimtab.jobs.judges.runner import apply_judge, compute_standing, open_judge
from trimtab.jobs.runtime.cluster import ray_session
from trimtab.jobs.runtime.config import as_source_list
from trimtab.judges.human_agreement import JudgeStanding
from trimtab.loading import find_prefixes
from trimtab.model.base_model import resolve_base_model


def evaluate_safety(config: SafetyConfig) -> tuple[list[ArmResult], JudgeStanding]:
    """Results of every arm on all the prompts, and how their judge stands. Raises errors of ours for data, prefixes and judges
    that cannot be used."""
    base = resolve_base_model(config.base, config.revision)
    prompts = limit_prompts(read_all_prompts(as_source_list(config.data), config.default_class, config.columns), config.limit)
    chosen = {name: prefix for spec in as_source_list(config.prefix) for name, prefix in find_prefixes(spec, base).items()}
    judge = open_judge(config.judge, base, config.gpus)
    standing = compute_standing(judge)
    with ray_session(config.address):
        results = evaluate_arms(
            base,
            build_standard_arms(chosen),
            {"prompts": prompts},
            config.max_tokens,
            build_engine_config(config.precision),
            config.gpus,
        )
        return apply_judge(results, judge, config.gpus)["prompts"], standing


def run_evaluate_safety(config: SafetyConfig) -> dict[str, Any]:
    """Print the table; write picture and answers where asked to."""
    results, standing = evaluate_safety(config)
    console.print(build_table(results, f"{config.base} on {', '.join(as_source_list(config.data))}"))
    print_line(standing.format_line())
    for r in results:
        shown = ", ".join(f"{name} {rate.value:.2f} of {rate.count}" for name, rate in r.sets.items())
        print_line(f"{r.name}: right on {shown}")
    judged = {"judge": standing.as_json()}
    if config.plot and not write_plane(results, Path(config.plot)):
        print_line(f"{config.plot} was not drawn: the plane needs harmful prompts and benign ones")
    if config.answers:
        Path(config.answers).write_text(json.dumps(results_as_json(results) | judged, indent=1) + "\n")
    return results_as_json(results, answers=False) | judged
