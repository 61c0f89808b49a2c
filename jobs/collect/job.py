"""`trimtab collect`: questions -> answers, labels and signals, in one pass of the frozen model.

trimtab collect --questions trimtab:countries --out signals
trimtab collect --questions labelled.jsonl --given true --out signals
trimtab collect --questions trimtab:countries --out signals --samples 10 --p_true true
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from transformers import PreTrainedTokenizerBase

from trimtab.artifacts.prefix import Prefix
from trimtab.cli.console import print_line
from trimtab.engine.config import EngineConfig
from trimtab.errors import ArtifactError, UsageError
from trimtab.generation_types import Answer
from trimtab.jobs.collect.config import CollectConfig
from trimtab.jobs.collect.plan import Label, PlannedRequest, drop_overlong, label_answers, load_plan
from trimtab.jobs.collect.sampler import AnswerSampler, GatheredAnswers
from trimtab.jobs.collect.signal_dataset import DatasetMetadata, append_part, begin_dataset, read_dataset, sample_columns
from trimtab.jobs.runtime.cluster import ray_session
from trimtab.jobs.runtime.engine_pool import run_pool
from trimtab.loading import find_prefixes
from trimtab.model.base_model import BaseModel, resolve_base_model, resolve_precision
from trimtab.model.chat_template import ChatRenderer, build_renderer
from trimtab.scores import p_true
from trimtab.util.remote_paths import Folder, open_folder

# Where in the depth a model tells most of what it knows, about (METHODS 2).
TWO_THIRDS = 2 / 3
# Row tokens of an engine; more only for a prefix that has more.
ROWS = 8


def collect(config: CollectConfig) -> Folder:
    """Ask what was not asked yet; gives the data set's folder. Raises errors of ours; Ctrl-C loses one batch at most."""
    base = resolve_base_model(config.base, config.revision)
    layers = tuple(sorted(set(config.layers))) or (round(base.depth * TWO_THIRDS), base.depth - 1)
    if layers[0] < 0 or layers[-1] >= base.depth:
        raise UsageError(f"layers must be from 0 to {base.depth - 1} for {base.name}, not {list(layers)}")
    prefix = next(iter(find_prefixes(config.prefix, base).values())) if config.prefix else None
    asked = load_plan(config)
    folder, meta = open_folder(config.out), _build_metadata(config, base, layers, prefix)
    there = begin_dataset(folder, meta)
    if more := there - {a.key for a in asked}:
        print_line(f"{folder} also holds {len(more)} answers to what is not asked now; they stay")
    rows = max(ROWS, len(prefix.vectors) if prefix else 0)
    renderer = build_renderer(base, rows)
    missing = {a.key: a for a in _drop_existing([a for a in asked if a.key not in there], config, renderer, prefix)}
    if missing:
        engine = EngineConfig(rows=rows, precision=config.precision, max_length=config.max_length, layers=layers, history=True)
        requests = {key: a.request for key, a in missing.items()}
        work = AnswerSampler(config.samples, config.temperature, config.p_true)
        with ray_session(config.scale.address):
            for batch in run_pool("answers with signals", base, requests, engine, config.scale, prefix, work, work.batch):
                pairs = [(missing[key], gathered) for key, gathered in batch.items()]
                labels = label_answers([(asked, gathered.answer) for asked, gathered in pairs], config.judge)
                lines = zip(pairs, labels, strict=True)
                made = [build_row(asked, gathered, label, renderer.tokenizer) for (asked, gathered), label in lines]
                append_part(folder, meta, made)
    return folder


def run_collect(config: CollectConfig) -> dict[str, Any]:
    """`trimtab collect`."""
    folder = collect(config)
    made = read_dataset(folder)
    right = int((made.truthful == 1).sum())
    labelled = int((~made.truthful.isnan()).sum())
    cut = made.whole.count(False)
    said = f"{len(made.keys)} answers, {right} of {labelled} right{f', {cut} cut off' if cut else ''}"
    print_line(f"{folder}: {said}; layers {list(made.meta.layers)}; {made.digest}")
    counts = {"answers": len(made.keys), "labelled": labelled, "right": right, "cut": cut}
    return asdict(made.meta) | counts | {"digest": made.digest}


def _drop_existing(
    asked: Sequence[PlannedRequest], config: CollectConfig, renderer: ChatRenderer, prefix: Prefix | None
) -> list[PlannedRequest]:
    """Those that the engine has room for; how many it has not is said."""
    fitting = drop_overlong(asked, config, renderer, prefix)
    if left := len(asked) - len(fitting):
        known = {one.key for one in fitting}
        first = next(one for one in asked if one.key not in known).question.question[:60]
        print_line(f"{left} of {len(asked)} are left out: too long for --max_length {config.max_length}, as {first!r}")
    return fitting


def build_row(
    asked: PlannedRequest, gathered: GatheredAnswers, label: Label, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """A line of the data set. Raises ArtifactError where the engine lost the answer's signals."""
    answer = gathered.answer
    if answer.signals is None:
        raise ArtifactError(f"the engine gave no signals for {asked.question.question[:60]!r}")
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
        "whole": answer.finish_reason == "stop",
        "psi": answer.signals.psi.flatten().tolist(),
        "history": answer.signals.history.flatten().tolist(),
        **sample_columns(gathered.samples),
        "p_true": None if gathered.verdict is None else compute_p_true(gathered.verdict, tokenizer),
    }


def compute_p_true(verdict: Answer, tokenizer: PreTrainedTokenizerBase) -> float:
    """The probability with which the model calls its answer true, by the likeliest first tokens of its verdict."""
    return p_true.compute_p_true((str(tokenizer.decode([token])), logp) for token, logp in verdict.logprobs[0].items())


def _build_metadata(config: CollectConfig, base: BaseModel, layers: tuple[int, ...], prefix: Prefix | None) -> DatasetMetadata:
    drawn = {"samples": config.samples, "temperature": config.temperature if config.samples else None}
    judged = {"max_tokens": config.max_tokens, "kind": config.kind, "given": config.given, "judge": asdict(config.judge)}
    judged |= {"max_length": config.max_length, "columns": config.columns, "separator": config.separator}
    asked = json.dumps({**judged, **drawn, "p_true": config.p_true})
    steered = prefix.card.digest if prefix else None
    # What `auto` is depends on the machine, and one data set is of one precision.
    return DatasetMetadata(base.name, base.fingerprint, layers, base.width, resolve_precision(config.precision), steered, asked)
