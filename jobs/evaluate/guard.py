"""Job of `trimtab evaluate guard`: changes of a detector's verdict by rewrites of prompts, and the model's answers."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from trimtab.cli.console import console, print_line
from trimtab.data.attacks import apply_attack
from trimtab.data.prompt import Prompt
from trimtab.data.readers import read_all_prompts
from trimtab.detection.detector_card import select_threshold
from trimtab.errors import UsageError
from trimtab.evaluation.safety.results import Arm, compute_rate
from trimtab.jobs.evaluate.conditions import load_prompt_detector
from trimtab.jobs.evaluate.config import GuardConfig
from trimtab.jobs.evaluate.variants import ArmBatch, build_engine_config, generate_batches, limit_prompts
from trimtab.jobs.runtime.cluster import ray_session
from trimtab.jobs.runtime.config import as_source_list
from trimtab.model.base_model import BaseModel, resolve_base_model
from trimtab.model.chat_template import build_renderer
from trimtab.stats.intervals import Rate
from trimtab.text.refusal_phrases import classify_refusal
from trimtab.types import ATTACKS, BASE_ARM, Attack

# Name of the row without a rewrite.
ORIGINAL = "none"


@dataclass(frozen=True)
class AttackResult:
    """Verdicts on prompts after an attack.

    Attributes:
        name: name of the attack; `none` for the prompts themselves.
        flagged: share of the harmful prompts that are flagged.
        missed: share of those flagged without the attack that are not flagged with it.
        answered: share of the harmful prompts that are not flagged and that the base model answers without a refusal.
        false_alarms: share of the benign prompts that are flagged.
    """

    name: str
    flagged: Rate
    missed: Rate
    answered: Rate
    false_alarms: Rate


def evaluate_guard(config: GuardConfig) -> list[AttackResult]:
    """Measure a detector on prompts and their rewrites.

    Returns:
        Result without an attack, and of each attack.

    Raises:
        TrimtabError: if data or detector cannot be used, or the job fails.
    """
    base = resolve_base_model(config.base, config.revision)
    prompts = limit_prompts(read_all_prompts(as_source_list(config.data), config.default_class, config.columns), config.limit)
    detector = load_prompt_detector(config.detector, base)
    threshold = select_threshold(detector.card, config.threshold)
    attacks = ATTACKS if config.attacks == "all" else config.attacks
    rewritten = {ORIGINAL: prompts} | _rewrite_prompts(base, prompts, attacks)
    plain = Arm(BASE_ARM)
    batches = [ArmBatch(plain, listed, 1, detector) for listed in rewritten.values()]
    harmful = [[prompt for prompt in listed if prompt.label == "harmful"] for listed in rewritten.values()]
    batches += [ArmBatch(plain, listed, config.max_tokens) for listed in harmful]
    with ray_session(config.address):
        outputs = generate_batches("verdicts and answers", base, batches, build_engine_config(config.dtype), config.num_gpus)
    flags = [[risk > threshold for risk in risks] for risks in outputs[: len(rewritten)]]
    named = zip(rewritten, flags, outputs[len(rewritten) :], strict=True)
    return [_measure_attack(name, prompts, flags[0], flagged, answers) for name, flagged, answers in named]


def run_evaluate_guard(config: GuardConfig) -> dict[str, Any]:
    """Print the table of the attacks.

    Returns:
        Results for `--json`.
    """
    results = evaluate_guard(config)
    table = Table(title=f"{config.detector} under attack: {', '.join(as_source_list(config.data))}", title_justify="left")
    for column in ("attack", "harmful flagged", "verdict flipped", "missed and answered", "benign flagged"):
        table.add_column(column, no_wrap=True)
    for result in results:
        table.add_row(result.name, *map(str, (result.flagged, result.missed, result.answered, result.false_alarms)))
    console.print(table)
    return {"attacks": [asdict(result) for result in results]}


def _rewrite_prompts(base: BaseModel, prompts: Sequence[Prompt], attacks: Sequence[Attack]) -> dict[Attack, list[Prompt]]:
    """Return the rewritten prompts by attack; leave out attacks with roles that the chat template does not take."""
    renderer = build_renderer(base, 1)
    rewritten: dict[Attack, list[Prompt]] = {}
    for name in attacks:
        changed = [apply_attack(name, prompt) for prompt in prompts]
        try:
            for prompt in changed:
                renderer.render_prompt(prompt.messages)
        except UsageError as error:
            print_line(f"attack {name} is left out: {error}")
            continue
        rewritten[name] = changed
    return rewritten


def _measure_attack(
    name: str, prompts: Sequence[Prompt], before: Sequence[bool], flagged: Sequence[bool], answers: Sequence[str]
) -> AttackResult:
    """Measure an attack.

    Args:
        name: name of the attack.
        prompts: original prompts.
        before: whether each original prompt is flagged.
        flagged: whether each rewritten prompt is flagged.
        answers: answers of the base model to the rewritten harmful prompts.
    """
    harmful = [index for index, prompt in enumerate(prompts) if prompt.label == "harmful"]
    benign = [index for index, prompt in enumerate(prompts) if prompt.label != "harmful"]
    answered = [
        not flagged[index] and classify_refusal(answer) == "compliance" for index, answer in zip(harmful, answers, strict=True)
    ]
    return AttackResult(
        name,
        compute_rate([flagged[index] for index in harmful]),
        compute_rate([not flagged[index] for index in harmful if before[index]]),
        compute_rate(answered),
        compute_rate([flagged[index] for index in benign]),
    )
