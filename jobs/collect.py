"""`trimtab collect`: questions -> answers, labels and signals, in one pass of the frozen model.

trimtab collect --questions trimtab:countries --out signals
trimtab collect --questions labelled.jsonl --given true --out signals
trimtab collect --questions trimtab:countries --out signals --samples 10 --p_true true
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from trimtab import base as bases
from trimtab import chat
from trimtab.answers import Answer, Sampling
from trimtab.base import BaseModel
from trimtab.console import say
from trimtab.data import given as givens
from trimtab.data import questions as asks
from trimtab.data.given import Given
from trimtab.data.questions import Question
from trimtab.engine.config import EngineConfig
from trimtab.errors import ArtefactError, UsageError
from trimtab.judges.answers import mark
from trimtab.prefix import Prefix
from trimtab.scores import p_true
from trimtab.words import AnswerKind

from . import engines, signal_store
from .answer_store import Request
from .cluster import joined
from .collect_config import CollectConfig
from .config import sources
from .evaluate import find
from .gather import Gather, Gathered
from .signal_store import Meta

DEFAULT_KIND: AnswerKind = "contains"
# Where in the depth a model tells most of what it knows, about (METHODS 2).
TWO_THIRDS = 2 / 3


@dataclass(frozen=True)
class Asked:
    """A question with its key in the data set, and how its answer is judged, or what a given one is known to be."""

    key: str
    question: Question
    kind: AnswerKind
    request: Request
    truthful: bool | None = None


def collect(config: CollectConfig) -> Path:
    """Ask what was not asked yet; gives the data set's folder. Raises errors of ours; Ctrl-C loses one batch at most."""
    base = bases.resolve(config.base, config.revision)
    layers = tuple(sorted(set(config.layers))) or (round(base.depth * TWO_THIRDS), base.depth - 1)
    if layers[0] < 0 or layers[-1] >= base.depth:
        raise UsageError(f"layers must be from 0 to {base.depth - 1} for {base.name}, not {list(layers)}")
    prefix = next(iter(find(config.prefix, base).values())) if config.prefix else None
    asked = _planned(config)
    folder = Path(config.out)
    there = signal_store.begin(folder, _meta(config, base, layers, prefix))
    missing = {a.key: a for a in asked if a.key not in there}
    if missing:
        engine = EngineConfig(rows=8, precision=config.precision, max_length=2048, layers=layers, history=True)
        requests = {key: a.request for key, a in missing.items()}
        work = Gather(config.samples, config.temperature, config.p_true)
        tokenizer = chat.renderer(base, engine.rows).tokenizer
        with joined(config.scale.address):
            for batch in engines.worked("answers with signals", base, requests, engine, config.scale, prefix, work, work.batch):
                signal_store.append(folder, [row(missing[key], gathered, tokenizer) for key, gathered in batch.items()])
    return folder


def command(config: CollectConfig) -> dict[str, Any]:
    """`trimtab collect`."""
    folder = collect(config)
    made = signal_store.read(folder)
    right = int((made.truthful == 1).sum())
    labelled = int((~made.truthful.isnan()).sum())
    say(f"{folder}: {len(made.keys)} answers, {right} of {labelled} right; layers {list(made.meta.layers)}; {made.digest}")
    return asdict(made.meta) | {"answers": len(made.keys), "labelled": labelled, "right": right, "digest": made.digest}


def plan(config: CollectConfig, questions: Sequence[Question]) -> list[Asked]:
    """What is asked, each once. A key names the question and the answers it is compared with."""
    sampling = Sampling(max_tokens=config.max_tokens)
    found: dict[str, Asked] = {}
    for question in questions:
        kind = config.kind or question.kind or DEFAULT_KIND
        what = json.dumps([question.prompt.messages, question.answers, kind])
        key = hashlib.sha256(what.encode()).hexdigest()[:24]
        found.setdefault(key, Asked(key, question, kind, Request(question.prompt.messages, sampling)))
    return _some(config, found)


def plan_given(config: CollectConfig, answers: Sequence[Given]) -> list[Asked]:
    """Answers that are read, each once. A key names the question, the answer, and whether it is right."""
    found: dict[str, Asked] = {}
    for given in answers:
        what = json.dumps([given.question.prompt.messages, given.text, given.truthful])
        key = hashlib.sha256(what.encode()).hexdigest()[:24]
        request = Request(given.question.prompt.messages, Sampling(max_tokens=config.max_tokens), given.text)
        found.setdefault(key, Asked(key, given.question, DEFAULT_KIND, request, given.truthful))
    return _some(config, found)


def row(asked: Asked, gathered: Gathered, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """A line of the data set. Raises ArtefactError where the engine lost the answer's signals."""
    answer = gathered.answer
    if answer.signals is None:
        raise ArtefactError(f"the engine gave no signals for {asked.question.question[:60]!r}")
    truthful, why = _label(asked, answer)
    return {
        "key": asked.key,
        "question": asked.question.question,
        "source": asked.question.source,
        "answer": answer.text,
        "group": asked.question.prompt.group,
        "truthful": truthful,
        "why": why,
        "tokens": len(answer.token_ids),
        "whole": answer.finished == "stop",
        "psi": answer.signals.psi.flatten().tolist(),
        "history": answer.signals.history.flatten().tolist(),
        **signal_store.kept(gathered.samples),
        "p_true": None if gathered.verdict is None else believed(gathered.verdict, tokenizer),
    }


def believed(verdict: Answer, tokenizer: PreTrainedTokenizerBase) -> float:
    """The probability with which the model calls its answer true, by the likeliest first tokens of its verdict."""
    return p_true.probability((str(tokenizer.decode([token])), logp) for token, logp in verdict.logprobs[0].items())


def _planned(config: CollectConfig) -> list[Asked]:
    files = sources(config.questions)
    if config.given:
        return plan_given(config, givens.read_all(files, config.columns, config.separator))
    return plan(config, asks.read_all(files, config.columns))


def _some(config: CollectConfig, found: Mapping[str, Asked]) -> list[Asked]:
    if not found:
        raise UsageError(f"there is nothing to ask or to read in {', '.join(sources(config.questions))}")
    # By their keys: any order that is always the same, and has nothing to do with what is asked.
    return sorted(found.values(), key=lambda a: a.key)[: config.limit] if config.limit else list(found.values())


def _label(asked: Asked, answer: Answer) -> tuple[bool | None, str]:
    """Whether the answer is right, None where that is not known, and why."""
    if asked.request.given is not None:
        return asked.truthful, "as the file says" if asked.truthful is not None else "nobody said"
    judged = mark(asked.kind, answer.text, asked.question.answers)
    return (None if judged.abstained else judged.right), judged.why


def _meta(config: CollectConfig, base: BaseModel, layers: tuple[int, ...], prefix: Prefix | None) -> Meta:
    drawn = {"samples": config.samples, "temperature": config.temperature if config.samples else None}
    judged = {"max_tokens": config.max_tokens, "kind": config.kind, "given": config.given}
    asked = json.dumps({**judged, **drawn, "p_true": config.p_true})
    steered = prefix.card.digest if prefix else None
    return Meta(base.name, base.fingerprint, layers, base.width, config.precision, steered, asked)
