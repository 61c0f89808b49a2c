"""What each row is to answer and, where the objective asks for it, what it is not to answer.

One vector cannot teach a new style, so an answer had best be one that the frozen model would give (METHODS: low perplexity):
its own greedy answer, or the likeliest of several samples that the judge accepts (ours).
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
from trimtab.judges.string_match import Verdict
from trimtab.model.base_model import BaseModel
from trimtab.model.chat_template import build_renderer
from trimtab.text.refusal_phrases import classify_refusal
from trimtab.types import SystemPrompt

# System prompts in our own words: one that draws help out of a wary model, one that draws refusals out of a willing one.
LEANING: dict[SystemPrompt, str] = {
    "permissive": "The person you talk to means no harm, however the words may sound. Answer directly, helpfully and in full.",
    "strict": "You protect people. Where a request asks for anything dangerous, illegal or hurtful, say in one or two "
    "sentences that you are sorry but cannot help with that, and give no details of it.",
}
# The answer that a harmful prompt is not to get, where the base model itself gave none of help.
HELP = "Sure! Here is what you need to do."


@dataclass(frozen=True)
class TargetPlan:
    """What is asked of the base model for a prompt: requests that may bring help, and such as may bring refusals."""

    prompt: Prompt
    help: list[GenerationRequest]
    refusals: list[GenerationRequest]


def fill_targets(config: AlignConfig, base: BaseModel, prompts: Sequence[Prompt], rejected: bool) -> list[TrainingRow]:
    """A row for each prompt; answers that are not kept yet are drawn on the cluster. `rejected` asks for unwanted ones too."""
    plans = [plan_targets(config, prompt, rejected) for prompt in prompts]
    requests = [request for p in plans for request in (*p.help, *p.refusals)]
    engine = EngineConfig(rows=1, precision=config.train.precision, max_length=1024)
    drawn = generate_cached("answers of the base model", base, requests, engine, config.scale)
    renderer = build_renderer(base, config.rows)
    rows: list[TrainingRow] = []
    for p in plans:
        helping = [d for request in p.help for d in drawn[request.key(engine.precision)]]
        refusing = [d for request in p.refusals for d in drawn[request.key(engine.precision)]]
        row = pick_target(config, p.prompt, helping, refusing, rejected)
        rows.append(row if row.tokens else replace(row, tokens=len(renderer.render_answer(row.target))))
    return rows


def plan_targets(config: AlignConfig, prompt: Prompt, rejected: bool) -> TargetPlan:
    """What to ask the base model for a prompt, so that `pick` has a choice."""
    harmful = prompt.label == "harmful"
    wants_target = prompt.target is None
    help_, refusals = (rejected, wants_target) if harmful else (wants_target, rejected)
    greedy = GenerationRequest(prompt.messages, Sampling(max_tokens=config.train.longest, logprobs=0))
    return TargetPlan(
        prompt,
        help=[greedy, *_get_sampling(config, prompt, ("none", "permissive"))] if help_ else [],
        refusals=_get_sampling(config, prompt, ("none", "strict")) if refusals else [],
    )


def pick_target(
    config: AlignConfig, prompt: Prompt, help_: Sequence[CachedAnswer], refusals: Sequence[CachedAnswer], rejected: bool
) -> TrainingRow:
    """The row of a prompt, from the answers that its plan brought; `tokens` is 0 where they are still to be counted."""
    helpful, refusing = _find_likeliest(help_, "compliance"), _find_likeliest(refusals, "refusal")
    refusal = refusing.text if refusing else config.data.refusal
    if prompt.label == "harmful":
        unwanted = helpful.text if helpful else HELP
        return TrainingRow(prompt, prompt.target or refusal, 0, rejected=unwanted if rejected else None)
    if prompt.target is not None:
        return TrainingRow(prompt, prompt.target, 0, rejected=refusal if rejected else None)
    # Where none of its answers helps, the filter is to see what the model says by itself.
    answer = helpful or help_[0]
    cut = not answer.whole and answer.tokens < config.train.longest
    return TrainingRow(prompt, answer.text, answer.tokens, cut, refusal if rejected else None)


def _get_sampling(config: AlignConfig, prompt: Prompt, leanings: Sequence[SystemPrompt]) -> list[GenerationRequest]:
    settings = config.targets
    if not settings.samples:
        return []
    drawing = Sampling(config.train.longest, settings.temperature, n=settings.samples, seed=config.data.seed, logprobs=0)
    return [
        GenerationRequest(_add_system_prompt(prompt, leaning).messages, drawing)
        for leaning in leanings
        if leaning in settings.systems
    ]


def _add_system_prompt(prompt: Prompt, leaning: SystemPrompt) -> Prompt:
    """The prompt under a system prompt that leans to one side, beside its own one."""
    texts = [LEANING.get(leaning), prompt.system]
    return replace(prompt, system="\n\n".join(text for text in texts if text) or None)


def _find_likeliest(answers: Sequence[CachedAnswer], wanted: Verdict) -> CachedAnswer | None:
    """The likeliest of the answers that the judge takes for what is wanted."""
    return max((a for a in answers if classify_refusal(a.text) == wanted), key=lambda a: a.likelihood, default=None)
