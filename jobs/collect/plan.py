"""Plan of a signal data set: requests to the model and labels of their answers."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trimtab.artifacts.prefix import Prefix
from trimtab.data.attacks import build_rewrites
from trimtab.data.prompt import Prompt, compute_prompt_key
from trimtab.data.questions import Question, read_all_questions
from trimtab.data.readers import read_all_prompts
from trimtab.data.supplied_answers import SuppliedAnswer, read_all_supplied_answers
from trimtab.errors import UsageError
from trimtab.generation_types import Answer, Sampling
from trimtab.jobs.collect.config import CollectConfig
from trimtab.jobs.collect.sampler import build_verdict_request
from trimtab.jobs.judges.config import JudgeConfig
from trimtab.jobs.runtime.config import as_source_list
from trimtab.jobs.runtime.engine_pool import GenerationRequest
from trimtab.judges.answer_matching import AnswerMark, mark_answer, parse_expected_number
from trimtab.judges.llm_answer import LlmAnswerJudge
from trimtab.model.chat_template import ChatRenderer, Message
from trimtab.types import ATTACKS, AnswerKind, Attack, Label
from trimtab.util.identifiers import compute_key

DEFAULT_KIND: AnswerKind = "contains"
AnswerLabel = tuple[bool | None, str]
"""Whether an answer is right or a prompt is benign, None if unknown, and the reason."""


@dataclass(frozen=True)
class PlannedRequest:
    """Question to collect, with its request.

    Attributes:
        key: key of the row in the data set.
        question: question with its reference answers.
        kind: comparison of the answer with the reference answers.
        request: request to the engine.
        truthful: label of a supplied answer or a prompt; None if it is unknown or the answer is generated.
        label: class of a prompt; None for a question.
        labels: labels of a prompt.
        original: key of the prompt that this one is a rewrite of; None for other prompts.
    """

    key: str
    question: Question
    kind: AnswerKind
    request: GenerationRequest
    truthful: bool | None = None
    label: Label | None = None
    labels: tuple[str, ...] = ()
    original: str | None = None


def load_plan(config: CollectConfig) -> list[PlannedRequest]:
    """Return the planned requests of the configured sources.

    Raises:
        UsageError: if a source cannot be read or is empty.
    """
    if config.subject == "prompt":
        prompts = read_all_prompts(as_source_list(config.data), config.label, config.columns)
        attacks = ATTACKS if config.attacks == "all" else config.attacks
        return build_prompt_plan(config, prompts, attacks)
    files = as_source_list(config.questions)
    if config.read_answers:
        return build_supplied_plan(config, read_all_supplied_answers(files, config.columns, config.answer_separator))
    return build_plan(config, read_all_questions(files, config.columns))


def build_plan(config: CollectConfig, questions: Sequence[Question]) -> list[PlannedRequest]:
    """Return one planned request per unique question.

    The key hashes the question and the reference answers.

    Raises:
        UsageError: if answers are compared as numbers and a reference answer contains none, or if there are no questions.
    """
    sampling = Sampling(max_tokens=config.max_tokens)
    planned: dict[str, PlannedRequest] = {}
    for question in questions:
        kind = config.kind or question.kind or DEFAULT_KIND
        identity = json.dumps([question.prompt.messages, question.answers, kind])
        key = compute_key(identity, 24)
        if kind == "numeric" and config.judge.kind == "string":
            for answer in question.answers:
                parse_expected_number(answer)
        request = GenerationRequest(question.prompt.messages, sampling, recorded=config.unfinished)
        planned.setdefault(key, PlannedRequest(key, question, kind, request))
    return _subsample(config, planned)


def build_supplied_plan(config: CollectConfig, answers: Sequence[SuppliedAnswer]) -> list[PlannedRequest]:
    """Return one planned request per unique supplied answer.

    The key hashes the question, the answer, and its label.

    Raises:
        UsageError: if there are no answers.
    """
    planned: dict[str, PlannedRequest] = {}
    for answer in answers:
        identity = json.dumps([answer.question.prompt.messages, answer.text, answer.truthful])
        key = compute_key(identity, 24)
        sampling = Sampling(max_tokens=config.max_tokens)
        request = GenerationRequest(answer.question.prompt.messages, sampling, answer.text, recorded=config.unfinished)
        planned.setdefault(key, PlannedRequest(key, answer.question, DEFAULT_KIND, request, answer.truthful))
    return _subsample(config, planned)


def build_prompt_plan(config: CollectConfig, prompts: Sequence[Prompt], attacks: Sequence[Attack] = ()) -> list[PlannedRequest]:
    """Return one planned request per unique prompt and rewrite; the engine reads the prompt and generates one token.

    Raises:
        UsageError: if there are no prompts.
    """
    planned: dict[str, PlannedRequest] = {}
    rewrites = [(rewrite, compute_prompt_key(prompt)) for rewrite, prompt in build_rewrites(prompts, attacks)]
    for prompt, original in [*((prompt, None) for prompt in prompts), *rewrites]:
        key, benign = compute_prompt_key(prompt), prompt.label != "harmful"
        question = Question(prompt.prompt, (), prompt.source, group=prompt.group)
        request = GenerationRequest(prompt.messages, Sampling(max_tokens=1), recorded=True)
        columns = benign, prompt.label, prompt.labels, original
        planned.setdefault(key, PlannedRequest(key, question, DEFAULT_KIND, request, *columns))
    return _subsample(config, planned)


def drop_overlong(
    planned: Sequence[PlannedRequest], config: CollectConfig, renderer: ChatRenderer, prefix: Prefix | None
) -> list[PlannedRequest]:
    """Return the requests that fit into `max_model_len` tokens.

    The prompt must leave room for an answer. With `p_true`, the verdict request must fit too.
    """

    def count_tokens(messages: Sequence[Message]) -> int:
        rows = range(renderer.first_slot, renderer.first_slot + len(prefix.vectors)) if prefix else ()
        return len(renderer.render_prompt(messages, prefix.card.position if prefix else "system", rows))

    def count_required(item: PlannedRequest) -> int:
        prompt = count_tokens(item.request.messages)
        if not config.p_true:
            return prompt
        answer = Answer(item.request.supplied_answer or "", (), "stop", 0)
        # A generated text may have more tokens when it is tokenized again.
        answer_tokens = 0 if item.request.supplied_answer is not None else 2 * config.max_tokens
        return max(prompt, count_tokens(build_verdict_request(item.request, answer).messages) + answer_tokens)

    # Two more tokens: the first one of an answer, and the one that vLLM generates after a supplied answer.
    return [item for item in planned if count_required(item) + 2 <= config.max_model_len]


def label_answers(pairs: Sequence[tuple[PlannedRequest, Answer]], judge: JudgeConfig) -> list[AnswerLabel]:
    """Return the label of each answer or prompt.

    Prompts have a class. Complete supplied answers take the label of their file. Generated answers are judged by the
    endpoint, or compared with the reference answers.

    Raises:
        JobError: if the endpoint returns no verdict.
    """
    if pairs and pairs[0][0].label is not None:
        return [(item.truthful, f"class {item.label}") for item, _ in pairs]
    if pairs and pairs[0][0].request.supplied_answer is not None:
        return [_file_label(item, answer) for item, answer in pairs]
    if judge.kind == "endpoint":
        endpoint = LlmAnswerJudge(judge.url or "", judge.model or "", judge.max_concurrency)
        marks = endpoint.mark_answers([(item.question, answer.text) for item, answer in pairs])
    else:
        marks = [mark_answer(item.kind, answer.text, item.question.answers) for item, answer in pairs]
    return [_label(mark, item, answer) for mark, (item, answer) in zip(marks, pairs, strict=True)]


def _file_label(item: PlannedRequest, answer: Answer) -> AnswerLabel:
    if answer.finish_reason != "stop":
        return None, "truncated at max_length; the file labels the complete answer"
    return item.truthful, "label from the file" if item.truthful is not None else "no label in the file"


def _label(mark: AnswerMark, item: PlannedRequest, answer: Answer) -> AnswerLabel:
    # Truncated by the engine's maximum length, not by --max_tokens: the complete answer might have been right.
    truncated = answer.finish_reason == "length" and len(answer.token_ids) < item.request.sampling.max_tokens
    if truncated and not mark.right:
        return None, "truncated at max_length"
    return None if mark.abstained else mark.right, mark.why


def _subsample(config: CollectConfig, planned: Mapping[str, PlannedRequest]) -> list[PlannedRequest]:
    if not planned:
        raise UsageError(f"there are no rows in {', '.join(as_source_list(config.data or config.questions))}")
    # Keys are hashes: their order is reproducible and independent of the content.
    return sorted(planned.values(), key=lambda item: item.key)[: config.limit] if config.limit else list(planned.values())
