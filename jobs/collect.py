"""`trimtab collect`: questions -> answers, labels and signals, in one pass of the frozen model.

trimtab collect --questions trimtab:countries --out signals
trimtab collect --questions labelled.jsonl --given true --out signals
trimtab collect --questions trimtab:countries --out signals --samples 10 --p_true true
"""

import json
from dataclasses import asdict
from typing import Any

from transformers import PreTrainedTokenizerBase

from trimtab import base as bases
from trimtab import chat
from trimtab.answers import Answer
from trimtab.base import BaseModel
from trimtab.console import say
from trimtab.engine.config import EngineConfig
from trimtab.errors import ArtefactError, UsageError
from trimtab.places import Place, place
from trimtab.prefix import Prefix
from trimtab.scores import p_true

from . import engines, signal_store
from .asked import Asked, Label, labelled, planned
from .cluster import joined
from .collect_config import CollectConfig
from .evaluate import find
from .gather import Gather, Gathered
from .signal_store import Meta

# Where in the depth a model tells most of what it knows, about (METHODS 2).
TWO_THIRDS = 2 / 3


def collect(config: CollectConfig) -> Place:
    """Ask what was not asked yet; gives the data set's folder. Raises errors of ours; Ctrl-C loses one batch at most."""
    base = bases.resolve(config.base, config.revision)
    layers = tuple(sorted(set(config.layers))) or (round(base.depth * TWO_THIRDS), base.depth - 1)
    if layers[0] < 0 or layers[-1] >= base.depth:
        raise UsageError(f"layers must be from 0 to {base.depth - 1} for {base.name}, not {list(layers)}")
    prefix = next(iter(find(config.prefix, base).values())) if config.prefix else None
    asked = planned(config)
    folder = place(config.out)
    there = signal_store.begin(folder, _meta(config, base, layers, prefix))
    missing = {a.key: a for a in asked if a.key not in there}
    if missing:
        engine = EngineConfig(rows=8, precision=config.precision, max_length=2048, layers=layers, history=True)
        requests = {key: a.request for key, a in missing.items()}
        work = Gather(config.samples, config.temperature, config.p_true)
        tokenizer = chat.renderer(base, engine.rows).tokenizer
        with joined(config.scale.address):
            for batch in engines.worked("answers with signals", base, requests, engine, config.scale, prefix, work, work.batch):
                pairs = [(missing[key], gathered) for key, gathered in batch.items()]
                labels = labelled([(asked, gathered.answer.text) for asked, gathered in pairs], config.judge)
                lines = zip(pairs, labels, strict=True)
                signal_store.append(folder, [row(asked, gathered, label, tokenizer) for (asked, gathered), label in lines])
    return folder


def command(config: CollectConfig) -> dict[str, Any]:
    """`trimtab collect`."""
    folder = collect(config)
    made = signal_store.read(folder)
    right = int((made.truthful == 1).sum())
    labelled = int((~made.truthful.isnan()).sum())
    say(f"{folder}: {len(made.keys)} answers, {right} of {labelled} right; layers {list(made.meta.layers)}; {made.digest}")
    return asdict(made.meta) | {"answers": len(made.keys), "labelled": labelled, "right": right, "digest": made.digest}


def row(asked: Asked, gathered: Gathered, label: Label, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """A line of the data set. Raises ArtefactError where the engine lost the answer's signals."""
    answer = gathered.answer
    if answer.signals is None:
        raise ArtefactError(f"the engine gave no signals for {asked.question.question[:60]!r}")
    truthful, why = label
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


def _meta(config: CollectConfig, base: BaseModel, layers: tuple[int, ...], prefix: Prefix | None) -> Meta:
    drawn = {"samples": config.samples, "temperature": config.temperature if config.samples else None}
    judged = {"max_tokens": config.max_tokens, "kind": config.kind, "given": config.given, "judge": asdict(config.judge)}
    asked = json.dumps({**judged, **drawn, "p_true": config.p_true})
    steered = prefix.card.digest if prefix else None
    return Meta(base.name, base.fingerprint, layers, base.width, config.precision, steered, asked)
