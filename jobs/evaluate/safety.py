"""`trimtab evaluate safety`: refusal and compliance on any prompt files, for the base, a text prompt and prefixes."""

import json
from pathlib import Path
from typing import Any

from trimtab.cli.console import console, say
from trimtab.data.readers import read_all
from trimtab.evaluation.safety import report
from trimtab.evaluation.safety.results import ArmResult
from trimtab.jobs.evaluate import variants
from trimtab.jobs.evaluate.config import SafetyConfig
from trimtab.jobs.judges import runner
from trimtab.jobs.runtime.cluster import joined
from trimtab.jobs.runtime.config import sources
from trimtab.judges.human_agreement import Standing
from trimtab.loading import find
from trimtab.model import base_model


def evaluate(config: SafetyConfig) -> tuple[list[ArmResult], Standing]:
    """Results of every arm on all the prompts, and how their judge stands. Raises errors of ours for data, prefixes and judges
    that cannot be used."""
    base = base_model.resolve(config.base, config.revision)
    prompts = variants.limited(read_all(sources(config.data), config.default_class, config.columns), config.limit)
    chosen = {name: prefix for spec in sources(config.prefix) for name, prefix in find(spec, base).items()}
    judge = runner.opened(config.judge, base, config.gpus)
    standing = runner.standing(judge)
    with joined(config.address):
        results = variants.evaluate(
            base,
            variants.standard_arms(chosen),
            {"prompts": prompts},
            config.max_tokens,
            variants.engine(config.precision),
            config.gpus,
        )
        return runner.rejudged(results, judge, config.gpus)["prompts"], standing


def command(config: SafetyConfig) -> dict[str, Any]:
    """Print the table; write picture and answers where asked to."""
    results, standing = evaluate(config)
    console.print(report.table(results, f"{config.base} on {', '.join(sources(config.data))}"))
    say(standing.line())
    for r in results:
        shown = ", ".join(f"{name} {rate.value:.2f} of {rate.count}" for name, rate in r.sets.items())
        say(f"{r.name}: right on {shown}")
    judged = {"judge": standing.as_json()}
    if config.plot and not report.plane(results, Path(config.plot)):
        say(f"{config.plot} was not drawn: the plane needs harmful prompts and benign ones")
    if config.answers:
        Path(config.answers).write_text(json.dumps(report.as_json(results) | judged, indent=1) + "\n")
    return report.as_json(results, answers=False) | judged
