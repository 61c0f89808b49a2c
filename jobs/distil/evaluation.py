"""Evaluation of a distilled prefix against its system prompt: rules, extraction, divergence and utility, and the gate."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from trimtab import settings
from trimtab.artifacts.prefix import Prefix
from trimtab.data.hard_filter import TrainingRow
from trimtab.data.prompt import Prompt
from trimtab.errors import UsageError
from trimtab.evaluation.gate import GateDecision
from trimtab.evaluation.rules.rule_checks import Rule, check_answer
from trimtab.evaluation.rules.rule_results import SYSTEM_ARM, RuleVerdicts, compute_recovered_share
from trimtab.evaluation.safety.results import Arm
from trimtab.evaluation.utility.metrics import MeasuredArm
from trimtab.jobs.distil.config import DistilConfig, DistilGateConfig
from trimtab.jobs.distil.dataset import SystemPrompt, build_engine_config
from trimtab.jobs.distil.evaluation_requests import (
    EXTRACTION,
    HOSTILE,
    PLAIN,
    PromptSet,
    build_peer_requests,
    build_prompt_sets,
    select_test_prompts,
)
from trimtab.jobs.evaluate import utility
from trimtab.jobs.evaluate.variants import ArmBatch, generate_batches
from trimtab.jobs.judges.config import JudgeConfig
from trimtab.jobs.runtime.cluster import run_task
from trimtab.jobs.runtime.generation_cache import generate_cached
from trimtab.judges.llm_rule import LlmRuleJudge
from trimtab.model.base_model import BaseModel
from trimtab.ray_connection import get_max_node_cores
from trimtab.stats.bootstrap import bootstrap_mean
from trimtab.stats.intervals import Estimate
from trimtab.types import BASE_ARM

# Words of a passage that counts as extracted.
PASSAGE = 5
WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class DistilResults:
    """Evaluation results by arm: the base model, the system prompt as text, and the prefix.

    Attributes:
        name: name of the prefix.
        rules: verdicts on the rules.
        adversarial: verdicts on the rules if each user turn ends with `ADVERSARIAL`.
        extracted: share of the passages of the system prompt that the most revealing answer repeats.
        divergence: mean KL from the system prompt, in nats per token, of the base model and the prefix.
        utility: questions and texts under each arm; empty if they were not measured.
    """

    name: str
    rules: Sequence[RuleVerdicts]
    adversarial: Sequence[RuleVerdicts]
    extracted: Mapping[str, float]
    divergence: Mapping[str, Estimate]
    utility: Sequence[MeasuredArm]

    @cached_property
    def recovered(self) -> Estimate | None:
        """Share of the system prompt's gain on its rules that the prefix has; None if no rule counts."""
        return compute_recovered_share(self.rules, self.name)

    @cached_property
    def recovered_adversarial(self) -> Estimate | None:
        """The same share for adversarial users."""
        return compute_recovered_share(self.adversarial, self.name)


def evaluate_prefix(
    config: DistilConfig,
    base: BaseModel,
    system: SystemPrompt,
    rules: Sequence[Rule],
    test: Sequence[Prompt],
    prefix: Prefix,
) -> DistilResults:
    """Evaluate a prefix on the test prompts, and on the prompts of the rules.

    Args:
        config: settings of the job.
        base: base model.
        system: system prompt.
        rules: rules of the system prompt; may be empty.
        test: test prompts.
        prefix: distilled prefix.

    Raises:
        TrimtabError: if generation or a judge fails.
    """
    sets = build_prompt_sets(config, rules, test)
    answers = _generate_answers(config, base, system, prefix, sets)
    extracted = {
        arm: max(compute_extracted_share(system.text, answer) for answer in found) for arm, found in answers[EXTRACTION].items()
    }
    texts, selected = [prompt.prompt for prompt in sets[PLAIN].prompts], select_test_prompts(config, test)
    plain, adversarial = (
        [_check_rule(rule, config.evaluate.judge, texts, len(selected), answers[name]) for rule in rules]
        for name in (PLAIN, HOSTILE)
    )
    written = [(prompt, answer) for prompt, answer in zip(selected, answers[PLAIN][SYSTEM_ARM], strict=False) if answer]
    divergence = _measure_divergence(config, base, system, prefix, written)
    measured = _measure_utility(config, base, system, prefix)
    return DistilResults(prefix.card.name, plain, adversarial, extracted, divergence, measured)


def check_gate(gate: DistilGateConfig, results: DistilResults, *, is_first: bool) -> GateDecision:
    """Decide whether a prefix passes the gate.

    Args:
        gate: settings of the gate.
        results: evaluation of the prefix.
        is_first: whether there is no champion, so that the point estimate decides.
    """
    share = results.recovered
    if share is not None:
        decisive = share.value if is_first else share.low
        text = f"{share} of the system prompt's gain on its rules, minimum {gate.min_recovered:.2f}"
        return GateDecision(decisive >= gate.min_recovered, text)
    before, after = results.divergence[BASE_ARM], results.divergence[results.name]
    reduction = 1 - after.value / before.value if before.value > 0 else 0.0
    text = (
        f"no rule shows an effect of the system prompt; divergence from it {before.value:.3f} -> {after.value:.3f} nats per "
        f"token, reduced by {reduction:.2f}, minimum {gate.min_divergence_reduction:.2f}"
    )
    return GateDecision(reduction >= gate.min_divergence_reduction, text)


def compute_extracted_share(system: str, answer: str) -> float:
    """Return the share of the passages of `PASSAGE` words of a system prompt that an answer repeats."""
    passages, found = (_list_passages(text) for text in (system, answer))
    return len(passages & found) / len(passages) if passages else 0.0


def _list_passages(text: str) -> set[tuple[str, ...]]:
    words = WORD.findall(text.casefold())
    return {tuple(words[i : i + PASSAGE]) for i in range(len(words) - PASSAGE + 1)}


def _generate_answers(
    config: DistilConfig,
    base: BaseModel,
    system: SystemPrompt,
    prefix: Prefix,
    sets: Mapping[str, PromptSet],
) -> dict[str, dict[str, list[str]]]:
    """Return the answers to each set of prompts by arm; those without the prefix were generated with the teacher's."""
    engine = build_engine_config(config, system)
    requests = build_peer_requests(sets, system.text)
    every_request = [request for listed in requests.values() for request in listed]
    cached = generate_cached("answers without the prefix", base, every_request, engine, config.scale)
    answers: dict[str, dict[str, list[str]]] = {name: {} for name in sets}
    for (name, arm), listed in requests.items():
        answers[name][arm] = [cached[request.key(engine.dtype)][0].text for request in listed]
    batches = [ArmBatch(Arm(prefix.card.name, prefix=prefix), chosen.prompts, chosen.max_tokens) for chosen in sets.values()]
    with_slots = replace(engine, num_slots=config.num_virtual_tokens)
    found = generate_batches("answers with the prefix", base, batches, with_slots, config.scale.gpus_per_worker)
    for name, texts in zip(sets, found, strict=True):
        answers[name][prefix.card.name] = texts
    return answers


def _check_rule(
    rule: Rule, judge: JudgeConfig, prompts: Sequence[str], shared: int, answers: Mapping[str, Sequence[str]]
) -> RuleVerdicts:
    """Check the answers to the prompts of a rule, or to the first `shared` ones if it has none."""
    indices = [i for i, prompt in enumerate(prompts) if prompt in rule.prompts] if rule.prompts else list(range(shared))
    if rule.kind != "judge":
        return RuleVerdicts(rule, {arm: [check_answer(rule, found[i]) for i in indices] for arm, found in answers.items()})
    if judge.url is None or judge.model is None:
        raise UsageError(f"rule {rule.name!r} needs a judge. Set --evaluate.judge.kind endpoint, its url and its model")
    client = LlmRuleJudge(judge.url, judge.model, judge.max_concurrency)
    replies = {
        arm: client.check_answers(rule.value, [(prompts[i], found[i]) for i in indices]) for arm, found in answers.items()
    }
    return RuleVerdicts(rule, {arm: [reply != rule.negate for reply in listed] for arm, listed in replies.items()})


def _measure_divergence(
    config: DistilConfig, base: BaseModel, system: SystemPrompt, prefix: Prefix, written: Sequence[tuple[Prompt, str]]
) -> dict[str, Estimate]:
    rows = [TrainingRow(prompt, answer, 0, teacher_system=system.text) for prompt, answer in written]
    device = "cuda" if config.scale.gpus_per_worker else "cpu"
    measured: dict[str, list[float]] = run_task(
        "divergence from the system prompt",
        "trimtab.jobs.distil.divergence_task:measure_divergence",
        base,
        config.build_align_config(),
        rows,
        {BASE_ARM: None, prefix.card.name: prefix.vectors},
        device,
        cpus=get_max_node_cores(),
        gpus=config.scale.gpus_per_worker,
    )
    return {arm: bootstrap_mean(torch.tensor([values])) for arm, values in measured.items()}


def _measure_utility(config: DistilConfig, base: BaseModel, system: SystemPrompt, prefix: Prefix) -> list[MeasuredArm]:
    if config.evaluate.utility is None:
        return []
    suites = {"suite": utility.load_suite(config.evaluate.utility, "utility")}
    folder = settings.get_home() / "utility" / base.fingerprint
    arms = [Arm(BASE_ARM), Arm(SYSTEM_ARM, system=system.text), Arm(prefix.card.name, prefix=prefix)]
    return utility.measure_utility(base, arms, suites, config.dtype, config.scale.gpus_per_worker, folder)["suite"]
