"""`trimtab evaluate safety`: refusal and compliance on any prompt files, for the base, a text prompt and prefixes."""

import json
from pathlib import Path
from typing import Any

from trimtab.artifacts import prefix as prefixes
from trimtab.artifacts.prefix import Prefix
from trimtab.cli.console import console, say
from trimtab.data.readers import read_all
from trimtab.evaluation.safety import report
from trimtab.evaluation.safety.results import ArmResult
from trimtab.jobs import arms, judging
from trimtab.jobs.cluster import joined
from trimtab.jobs.config import sources
from trimtab.jobs.evaluate_config import SafetyConfig
from trimtab.judges.human_agreement import Standing
from trimtab.model import base_model
from trimtab.model.base_model import BaseModel
from trimtab.tracking import registry


def evaluate(config: SafetyConfig) -> tuple[list[ArmResult], Standing]:
    """Results of every arm on all the prompts, and how their judge stands. Raises errors of ours for data, prefixes and judges
    that cannot be used."""
    base = base_model.resolve(config.base, config.revision)
    prompts = arms.limited(read_all(sources(config.data), config.default_class, config.columns), config.limit)
    chosen = {name: prefix for spec in sources(config.prefix) for name, prefix in find(spec, base).items()}
    judge = judging.opened(config.judge, base, config.gpus)
    standing = judging.standing(judge)
    with joined(config.address):
        results = arms.evaluate(
            base,
            arms.standard_arms(chosen),
            {"prompts": prompts},
            config.max_tokens,
            arms.engine(config.precision),
            config.gpus,
        )
        return judging.rejudged(results, judge, config.gpus)["prompts"], standing


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


def find(spec: str, base: BaseModel) -> dict[str, Prefix]:
    """Prefixes by name: `champion` is every champion of the base model, if there is one; else a folder, NAME, or
    NAME@alias-or-version."""
    if Path(spec).is_dir():
        prefix = prefixes.load(Path(spec), base)
        return {prefix.card.name: prefix}
    if spec == registry.CHAMPION:
        found = [v for v in registry.versions(base.name, kind="prefix") if registry.CHAMPION in v.aliases]
        if not found:
            say(f"no prefix of {base.name} is champion yet (--prefix names another): the base model and the text prompt alone")
    else:
        name, _, ref = spec.partition("@")
        found = [registry.find(base.name, name, ref or registry.CHAMPION)]
    return {f"{v.name}@{v.version}": registry.load(v, base) for v in found}
