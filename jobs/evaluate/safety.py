"""Job of `trimtab evaluate safety`: refusal and compliance of the base model, a text prompt, and prefixes."""

import json
from pathlib import Path
from typing import Any

from trimtab.cli.console import console, print_line
from trimtab.data.readers import read_all_prompts
from trimtab.detection.detector_card import select_threshold
from trimtab.evaluation.safety.guarded import build_guarded_results
from trimtab.evaluation.safety.report import build_table, results_as_json, write_plane
from trimtab.evaluation.safety.results import ArmResult
from trimtab.jobs.evaluate.conditions import apply_conditions, load_prompt_detector, replace_trained_risks
from trimtab.jobs.evaluate.config import SafetyConfig
from trimtab.jobs.evaluate.variants import (
    build_engine_config,
    build_standard_arms,
    evaluate_arms,
    evaluate_guarded_arms,
    limit_prompts,
)
from trimtab.jobs.judges.runner import apply_judge, compute_standing, open_judge
from trimtab.jobs.runtime.cluster import ray_session
from trimtab.jobs.runtime.config import as_source_list
from trimtab.judges.human_agreement import JudgeStanding
from trimtab.loading import find_prefixes
from trimtab.model.base_model import resolve_base_model


def evaluate_safety(config: SafetyConfig) -> tuple[list[ArmResult], JudgeStanding]:
    """Measure refusal and compliance of every arm.

    Returns:
        Result of each arm, and the agreement of the judge with human labels.

    Raises:
        TrimtabError: if data, a prefix or the judge cannot be used, or the job fails.
    """
    base = resolve_base_model(config.base, config.revision)
    prompts = limit_prompts(read_all_prompts(as_source_list(config.data), config.default_class, config.columns), config.limit)
    chosen = {name: prefix for spec in as_source_list(config.prefix) for name, prefix in find_prefixes(spec, base).items()}
    detector = None if config.detector is None else load_prompt_detector(config.detector, base)
    judge = open_judge(config.judge, base, config.num_gpus)
    standing = compute_standing(judge)
    arms, engine = build_standard_arms(chosen), build_engine_config(config.dtype)
    with ray_session(config.address):
        if detector is None:
            results = evaluate_arms(base, arms, {"prompts": prompts}, config.max_tokens, engine, config.num_gpus)
            results = apply_conditions(base, chosen, results, engine, config.num_gpus)
            return apply_judge(results, judge, config.num_gpus)["prompts"], standing
        answered, risks = evaluate_guarded_arms(base, arms, prompts, config.max_tokens, engine, config.num_gpus, detector)
        judged = apply_judge({"prompts": answered}, judge, config.num_gpus)["prompts"]
    threshold = select_threshold(detector.card, config.threshold)
    flagged = [risk > threshold for risk in replace_trained_risks(detector, prompts, risks)]
    plain, _, *steered = judged
    return [*judged, *build_guarded_results(plain, steered, flagged)], standing


def run_evaluate_safety(config: SafetyConfig) -> dict[str, Any]:
    """Print the table, and write the plot and answers if configured.

    Returns:
        Results without answers, for `--json`.
    """
    results, standing = evaluate_safety(config)
    console.print(build_table(results, f"{config.base} on {', '.join(as_source_list(config.data))}"))
    print_line(standing.format_line())
    for r in results:
        rates = ", ".join(f"{name} {rate.value:.2f} of {rate.count}" for name, rate in r.sets.items())
        print_line(f"{r.name}: right on {rates}")
    judge = {"judge": standing.as_json()}
    if config.plot_file and not write_plane(results, Path(config.plot_file)):
        print_line(f"{config.plot_file} was not drawn: the plot requires both harmful and benign prompts")
    if config.answers_file:
        Path(config.answers_file).write_text(json.dumps(results_as_json(results) | judge, indent=1) + "\n")
    return results_as_json(results, answers=False) | judge
