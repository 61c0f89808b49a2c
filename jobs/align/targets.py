"""Selection of the target answer of each training row and, if the objective needs it, of the rejected answer.

A few vectors cannot teach a new style, so a target should be likely under the frozen model (METHODS: low perplexity). It is
the greedy answer of the model, or the most likely of several samples that the judge accepts (our addition to the papers).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from trimtab.data.hard_filter import TrainingRow
from trimtab.data.prompt import Prompt
from trimtab.engine.config import EngineConfig
from trimtab.generation_types import Sampling
from trimtab.jobs.align.config import AlignConfig
from trimtab.jobs.runtime.engine_pool import GenerationRequest
from trimtab.jobs.runtime.generation_cache import CachedAnswer, generate_cached
from trimtab.model.base_model import BaseModel
from trimtab.model.chat_template import build_renderer
from trimtab.text.refusal_phrases import classify_refusal
from trimtab.types import SystemPrompt, Verdict

# Permissive: elicits compliance from a cautious model. Strict: elicits refusals from a compliant model.
SYSTEM_PROMPT_TEXTS: dict[SystemPrompt, str] = {
    "permissive": "The person you talk to means no harm, however the words may sound. Answer directly, helpfully and in full.",
    "strict": "You protect people. Where a request asks for anything dangerous, illegal or hurtful, say in one or two "
    "sentences that you are sorry but cannot help with that, and give no details of it.",
}
# Rejected answer of a harmful prompt if no answer of the base model complies.
HELP = "Sure! Here is what you need to do."


@dataclass(frozen=True)
class TargetPlan:
    """Generation requests for one prompt.

    Attributes:
        prompt: prompt that needs a target or a rejected answer.
        help: requests whose answers may comply.
        refusals: requests whose answers may refuse.
    """

    prompt: Prompt
    help: list[GenerationRequest]
    refusals: list[GenerationRequest]


def fill_targets(config: AlignConfig, base: BaseModel, prompts: Sequence[Prompt], rejected: bool) -> list[TrainingRow]:
    """Build a training row for each prompt; answers that are not in the cache are generated on the cluster.

    Args:
        config: settings of the job.
        base: base model that generates the answers.
        prompts: prompts with or without a target.
        rejected: whether rows also need a rejected answer.

    Raises:
        TrimtabError: if the engine rejects a request or generation fails.
    """
    plans = [plan_targets(config, prompt, rejected) for prompt in prompts]
    requests = [request for p in plans for request in (*p.help, *p.refusals)]
    engine = EngineConfig(num_slots=1, dtype=config.train.dtype, max_model_len=1024)
    answers = generate_cached("answers of the base model", base, requests, engine, config.scale)
    renderer = build_renderer(base, config.num_virtual_tokens)
    rows: list[TrainingRow] = []
    for p in plans:
        help_answers = [a for request in p.help for a in answers[request.key(engine.dtype)]]
        refusals = [a for request in p.refusals for a in answers[request.key(engine.dtype)]]
        row = pick_target(config, p.prompt, help_answers, refusals, rejected)
        rows.append(row if row.tokens else replace(row, tokens=len(renderer.render_answer(row.target))))
    return rows


def plan_targets(config: AlignConfig, prompt: Prompt, rejected: bool) -> TargetPlan:
    """Return the generation requests for a prompt.

    Args:
        config: settings of the job.
        prompt: prompt with or without a target.
        rejected: whether the row also needs a rejected answer.
    """
    harmful = prompt.label == "harmful"
    needs_target = prompt.target is None
    needs_help, needs_refusals = (rejected, needs_target) if harmful else (needs_target, rejected)
    greedy = GenerationRequest(prompt.messages, Sampling(max_tokens=config.train.max_target_tokens, logprobs=0))
    return TargetPlan(
        prompt,
        help=[greedy, *_get_sampling(config, prompt, ("none", "permissive"))] if needs_help else [],
        refusals=_get_sampling(config, prompt, ("none", "strict")) if needs_refusals else [],
    )


def pick_target(
    config: AlignConfig, prompt: Prompt, help_: Sequence[CachedAnswer], refusals: Sequence[CachedAnswer], rejected: bool
) -> TrainingRow:
    """Select the target and the rejected answer of a prompt.

    Args:
        config: settings of the job.
        prompt: prompt of the row; its own target takes precedence.
        help_: answers to the `help` requests of its plan.
        refusals: answers to the `refusals` requests of its plan.
        rejected: whether the row also needs a rejected answer.

    Returns:
        The training row. Its `tokens` is 0 if the tokens of the target are not counted yet.
    """
    compliance, sampled_refusal = _find_likeliest(help_, "compliance"), _find_likeliest(refusals, "refusal")
    refusal = sampled_refusal.text if sampled_refusal else config.data.refusal
    if prompt.label == "harmful":
        rejected_text = compliance.text if compliance else HELP
        return TrainingRow(prompt, prompt.target or refusal, 0, rejected=rejected_text if rejected else None)
    if prompt.target is not None:
        return TrainingRow(prompt, prompt.target, 0, rejected=refusal if rejected else None)
    # If no answer complies, the greedy answer is kept, so that the hard filter can remove the row.
    answer = compliance or help_[0]
    cut = not answer.finished and answer.tokens < config.train.max_target_tokens
    return TrainingRow(prompt, answer.text, answer.tokens, cut, refusal if rejected else None)


def _get_sampling(config: AlignConfig, prompt: Prompt, systems: Sequence[SystemPrompt]) -> list[GenerationRequest]:
    settings = config.targets
    if not settings.num_samples:
        return []
    sampling = Sampling(
        config.train.max_target_tokens, settings.temperature, n=settings.num_samples, seed=config.data.seed, logprobs=0
    )
    return [
        GenerationRequest(_add_system_prompt(prompt, system).messages, sampling)
        for system in systems
        if system in settings.system_prompts
    ]


def _add_system_prompt(prompt: Prompt, system: SystemPrompt) -> Prompt:
    """Return the prompt with a system prompt placed before its own one."""
    texts = [SYSTEM_PROMPT_TEXTS.get(system), prompt.system]
    return replace(prompt, system="\n\n".join(text for text in texts if text) or None)


def _find_likeliest(answers: Sequence[CachedAnswer], verdict: Verdict) -> CachedAnswer | None:
    """Return the most likely answer with a verdict of the judge, None if there is none."""
    return max((a for a in answers if classify_refusal(a.text) == verdict), key=lambda a: a.mean_log_probability, default=None)
