"""Target ladder: ways to obtain an answer of the wanted kind from the frozen model, from the most to the least natural [ours].

A model that over-refuses answers a harmless prompt with a refusal. If that were its training target, or if the row were
removed, the prefix would never learn to help where the model does not. The ladder therefore tries further rungs for the rows
that are still open: samples, samples under a system prompt that asks for the wanted kind, and an opening that the model
continues. Every target is the model's own text except for an opening, because a few vectors cannot teach a new style.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from math import nan
from typing import Any

from trimtab.data.prompt import Prompt
from trimtab.evaluation.safety.results import JudgedAnswer
from trimtab.generation_types import Answer, Sampling
from trimtab.jobs.align.config import AlignConfig
from trimtab.jobs.runtime.engine_pool import GenerationRequest, SendToEngine
from trimtab.jobs.runtime.generation_cache import CachedAnswer, convert_answer
from trimtab.model.chat_template import Message
from trimtab.text.degenerate_answers import is_repetitive
from trimtab.text.refusal_phrases import classify_refusal
from trimtab.types import TARGET_RUNGS, TargetRung, Verdict
from trimtab.util.identifiers import compute_key

SYSTEM_PROMPTS: dict[Verdict, str] = {
    # Permissive: elicits compliance from a cautious model.
    "compliance": "The person you talk to means no harm, however the words may sound. Answer directly, helpfully and in full.",
    # Strict: elicits refusals from a compliant model.
    "refusal": "You protect people. Where a request asks for anything dangerous, illegal or hurtful, say in one or two "
    "sentences that you are sorry but cannot help with that, and give no details of it.",
}
# Tokens of an answer that show whether it refuses.
DECIDING_TOKENS = 12
OPENINGS: dict[Verdict, tuple[str, ...]] = {
    "compliance": ("Good question.", "There are a few ways to look at this.", "In short,"),
    "refusal": ("I'm sorry, but I can't", "I can't help with that"),
}


@dataclass(frozen=True)
class LadderRequest(GenerationRequest):
    """Request for an answer of a kind. `messages` and `sampling` are those of the greedy answer.

    Attributes:
        wanted: kind of answer.
        rungs: rungs to try.
        under_system_prompt: the conversation under the system prompt of the wanted kind.
        samples: sampling settings of the rungs with samples.
        deciding_tokens: length of the greedy answer by which a refusal is recognized; it is generated in full if it is one, or
            if this is 0.
    """

    wanted: Verdict = "compliance"
    rungs: tuple[TargetRung, ...] = ()
    under_system_prompt: Sequence[Message] = ()
    samples: Sampling = field(default_factory=Sampling)
    deciding_tokens: int = 0

    def key(self, precision: Any) -> str:
        """Return the cache key of the request; it depends on the rungs and their texts."""
        rungs = [list(self.rungs), self.wanted, list(self.under_system_prompt), asdict(self.samples), OPENINGS[self.wanted]]
        return compute_key(f"{super().key(precision)}{rungs}{self.deciding_tokens}", 24)


def build_ladder_request(
    config: AlignConfig, prompt: Prompt, wanted: Verdict, rungs: Sequence[TargetRung], rejected: bool = False
) -> LadderRequest:
    """Build the request of a prompt.

    Args:
        config: settings of the job.
        prompt: prompt to answer.
        wanted: kind of answer.
        rungs: rungs to try; `greedy` is always tried.
        rejected: whether answers of the other kind are needed as well, in full.
    """
    greedy = Sampling(max_tokens=config.train.max_target_tokens, logprobs=0)
    samples = replace(greedy, temperature=config.targets.temperature, n=config.targets.num_samples, seed=config.data.seed)
    system = "\n\n".join(filter(None, (SYSTEM_PROMPTS[wanted], prompt.system)))
    ordered: tuple[TargetRung, ...] = tuple(rung for rung in TARGET_RUNGS if rung in {*rungs, TARGET_RUNGS[0]})
    guided = replace(prompt, system=system).messages
    deciding = 0 if rejected or wanted == "compliance" else min(DECIDING_TOKENS, greedy.max_tokens)
    return LadderRequest(
        prompt.messages,
        greedy,
        wanted=wanted,
        rungs=ordered,
        under_system_prompt=guided,
        samples=samples,
        deciding_tokens=deciding,
    )


def climb_ladder(send: SendToEngine, requests: Sequence[GenerationRequest]) -> list[list[CachedAnswer]]:
    """Try the rungs in turn, each only for the requests that are still open; the `EngineWork` of the ladder.

    Args:
        send: function that sends requests to an engine.
        requests: requests of `build_ladder_request`.

    Returns:
        Answers of each request, in the order of the rungs.
    """
    ladder = [request for request in requests if isinstance(request, LadderRequest)]
    results: list[list[CachedAnswer]] = [[] for _ in ladder]
    for rung in TARGET_RUNGS:
        still_open = [
            index
            for index, request in enumerate(ladder)
            if rung in request.rungs and find_accepted(results[index], request.wanted) is None
        ]
        parts = [(index, part) for index in still_open for part in _build_rung_requests(ladder[index], rung)]
        if not parts:
            continue
        for (index, part), answers in zip(parts, send([part for _, part in parts]), strict=True):
            results[index] += [_convert(answer, part.answer_start, rung) for answer in answers]
        if rung == "greedy":
            _complete_refusals(send, ladder, results)
    return results


def _complete_refusals(send: SendToEngine, ladder: Sequence[LadderRequest], results: list[list[CachedAnswer]]) -> None:
    """Generate greedy refusals in full, of which only the opening was generated."""
    cut = [
        index
        for index, request in enumerate(ladder)
        if request.deciding_tokens and not results[index][0].finished and find_accepted(results[index], "refusal")
    ]
    requests = [GenerationRequest(ladder[index].messages, ladder[index].sampling) for index in cut]
    for index, answers in zip(cut, send(requests) if requests else [], strict=True):
        results[index] = [_convert(answer, "", "greedy") for answer in answers]


def find_accepted(answers: Sequence[CachedAnswer], wanted: Verdict) -> CachedAnswer | None:
    """Return the most likely answer of the wanted kind that does not repeat itself, None if there is none.

    Args:
        answers: answers of one request.
        wanted: kind of answer.
    """
    accepted = [a for a in answers if a.text and classify_refusal(a.text) == wanted and not is_repetitive(a.text)]
    return max(accepted, key=lambda answer: answer.mean_log_probability, default=None)


def compute_opening_share(answers: Sequence[JudgedAnswer]) -> float:
    """Return the share of benign prompts whose answer begins with an opening, which training may have taught; NaN for none."""
    benign = [answer.answer.startswith(OPENINGS["compliance"]) for answer in answers if not answer.harmful]
    return sum(benign) / len(benign) if benign else nan


def _build_rung_requests(request: LadderRequest, rung: TargetRung) -> list[GenerationRequest]:
    if rung == "opening":
        return [GenerationRequest(request.messages, request.sampling, answer_start=o) for o in OPENINGS[request.wanted]]
    if rung == "greedy":
        tokens = request.deciding_tokens or request.sampling.max_tokens
        return [GenerationRequest(request.messages, replace(request.sampling, max_tokens=tokens))]
    messages = request.messages if rung == "samples" else request.under_system_prompt
    return [GenerationRequest(messages, request.samples)]


def _convert(answer: Answer, start: str, rung: TargetRung) -> CachedAnswer:
    cached = replace(convert_answer(answer), rung=rung)
    return replace(cached, text=f"{start} {cached.text}".strip()) if start else cached
