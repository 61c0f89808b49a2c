"""What is asked of the model or read with it for a data set of signals, and how its answers are labelled."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trimtab.artifacts.prefix import Prefix
from trimtab.data.given_answers import GivenAnswer, read_all_given_answers
from trimtab.data.questions import Question, read_all_questions
from trimtab.errors import UsageError
from trimtab.generation_types import Answer, Sampling
from trimtab.jobs.collect.config import CollectConfig
from trimtab.jobs.collect.sampler import read_verdict
from trimtab.jobs.judges.config import JudgeConfig
from trimtab.jobs.runtime.config import as_source_list
from trimtab.jobs.runtime.engine_pool import GenerationRequest
from trimtab.judges.answer_matching import AnswerMark, mark_answer, parse_expected_number
from trimtab.judges.llm_answer import LlmAnswerJudge
from trimtab.model.chat_template import ChatRenderer, Message
from trimtab.types import AnswerKind

DEFAULT_KIND: AnswerKind = "contains"
Label = tuple[bool | None, str]
"""Whether an answer is right, None where that is not known, and why."""


@dataclass(frozen=True)
class PlannedRequest:
    """A question with its key in the data set, and how its answer is judged, or what a given one is known to be."""

    key: str
    question: Question
    kind: AnswerKind
    request: GenerationRequest
    truthful: bool | None = None


def load_plan(config: CollectConfig) -> list[PlannedRequest]:
    """All that the settings ask for. Raises UsageError for sources that cannot be read, or hold nothing."""
    files = as_source_list(config.questions)
    if config.given:
        return build_given_plan(config, read_all_given_answers(files, config.columns, config.separator))
    return build_plan(config, read_all_questions(files, config.columns))


def build_plan(config: CollectConfig, questions: Sequence[Question]) -> list[PlannedRequest]:
    """What is asked, each once. A key names the question and the answers it is compared with. Raises UsageError where numbers
    are compared and an answer has none."""
    sampling = Sampling(max_tokens=config.max_tokens)
    found: dict[str, PlannedRequest] = {}
    for question in questions:
        kind = config.kind or question.kind or DEFAULT_KIND
        what = json.dumps([question.prompt.messages, question.answers, kind])
        key = hashlib.sha256(what.encode()).hexdigest()[:24]
        if kind == "numeric" and config.judge.kind == "string":
            for answer in question.answers:
                parse_expected_number(answer)
        found.setdefault(key, PlannedRequest(key, question, kind, GenerationRequest(question.prompt.messages, sampling)))
    return _subsample(config, found)


def build_given_plan(config: CollectConfig, answers: Sequence[GivenAnswer]) -> list[PlannedRequest]:
    """Answers that are read, each once. A key names the question, the answer, and whether it is right."""
    found: dict[str, PlannedRequest] = {}
    for given in answers:
        what = json.dumps([given.question.prompt.messages, given.text, given.truthful])
        key = hashlib.sha256(what.encode()).hexdigest()[:24]
        request = GenerationRequest(given.question.prompt.messages, Sampling(max_tokens=config.max_tokens), given.text)
        found.setdefault(key, PlannedRequest(key, given.question, DEFAULT_KIND, request, given.truthful))
    return _subsample(config, found)


def drop_overlong(
    asked: Sequence[PlannedRequest], config: CollectConfig, renderer: ChatRenderer, prefix: Prefix | None
) -> list[PlannedRequest]:
    """Those whose prompts leave room for an answer in the engine's length, and for the question whether it is true where that
    is asked."""

    def tokens(messages: Sequence[Message]) -> int:
        rows = range(renderer.first_row, renderer.first_row + len(prefix.vectors)) if prefix else ()
        return len(renderer.render_prompt(messages, prefix.card.place if prefix else "system", rows))

    def needed(one: PlannedRequest) -> int:
        prompt = tokens(one.request.messages)
        if not config.p_true:
            return prompt
        said = Answer(one.request.given or "", (), "stop", 0)
        # What a model writes may be more tokens where it is read again.
        answer = 0 if one.request.given is not None else 2 * config.max_tokens
        return max(prompt, tokens(read_verdict(one.request, said).messages) + answer)

    # Two more: an answer's first token, and the one that vLLM writes after an answer that it reads.
    return [one for one in asked if needed(one) + 2 <= config.max_length]


def label_answers(pairs: Sequence[tuple[PlannedRequest, Answer]], judge: JudgeConfig) -> list[Label]:
    """Whether answers are right, and why: as their file says, where they are given whole; else as the endpoint says, or by
    comparing with those wanted. Raises JobError where the endpoint does not say."""
    if pairs and pairs[0][0].request.given is not None:
        return [_as_given(asked, answer) for asked, answer in pairs]
    if judge.kind == "endpoint":
        asker = LlmAnswerJudge(judge.url or "", judge.model or "", judge.concurrency)
        marks = asker.mark_answers([(a.question, answer.text) for a, answer in pairs])
    else:
        marks = [mark_answer(a.kind, answer.text, a.question.answers) for a, answer in pairs]
    return [_label(m, asked, answer) for m, (asked, answer) in zip(marks, pairs, strict=True)]


def _as_given(asked: PlannedRequest, answer: Answer) -> Label:
    if answer.finish_reason != "stop":
        return None, "cut off at max_length; the file speaks of the whole"
    return asked.truthful, "as the file says" if asked.truthful is not None else "nobody said"


def _label(found: AnswerMark, asked: PlannedRequest, answer: Answer) -> Label:
    # Who is cut off by the engine's end, and not by --max_tokens, had more to say.
    short = answer.finish_reason == "length" and len(answer.token_ids) < asked.request.sampling.max_tokens
    if short and not found.right:
        return None, "cut off at max_length"
    return None if found.abstained else found.right, found.why


def _subsample(config: CollectConfig, found: Mapping[str, PlannedRequest]) -> list[PlannedRequest]:
    if not found:
        raise UsageError(f"there is nothing to ask or to read in {', '.join(as_source_list(config.questions))}")
    # By their keys: any order that is always the same, and has nothing to do with what is asked.
    return sorted(found.values(), key=lambda a: a.key)[: config.limit] if config.limit else list(found.values())
