"""Job of `trimtab collect`: signals and labels of answers or prompts, in one pass of the frozen model.

trimtab collect --questions trimtab:countries --out signals
trimtab collect --questions labeled.jsonl --read_answers true --out signals
trimtab collect --questions trimtab:countries --out signals --num_samples 10 --p_true true
trimtab collect --subject prompt --data trimtab:guard --out signals
"""

import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from trimtab.artifacts.prefix import Prefix
from trimtab.cli.console import print_line
from trimtab.detection.signal_dataset import read_dataset, sample_columns
from trimtab.detection.signal_files import DatasetMetadata, append_part, begin_dataset, metadata_as_json
from trimtab.detection.signals import convert_to_prompt_states
from trimtab.engine.config import EngineConfig
from trimtab.errors import ArtifactError, InterruptedByUserError, UsageError
from trimtab.generation_types import Answer, Signals
from trimtab.jobs.collect.config import CollectConfig
from trimtab.jobs.collect.plan import AnswerLabel, PlannedRequest, drop_overlong, label_answers, load_plan
from trimtab.jobs.collect.sampler import AnswerSampler, GatheredAnswers
from trimtab.jobs.runtime.cluster import ray_session
from trimtab.jobs.runtime.engine_pool import run_pool
from trimtab.loading import find_prefixes
from trimtab.model.base_model import BaseModel, resolve_base_model, resolve_dtype
from trimtab.model.chat_template import ChatRenderer, build_renderer
from trimtab.scores import p_true
from trimtab.types import Subject
from trimtab.util.remote_paths import Folder, open_folder
from trimtab.util.termination import defer_interrupt

# Approximate relative depth of the most informative layer (METHODS 2).
TWO_THIRDS = 2 / 3
# Relative depths of layers that separate prompts best: the last layers prepare the answer (ours).
PROMPT_DEPTHS = (0.5, 0.6, TWO_THIRDS, 0.75)
# Minimum number of row tokens of an engine; a longer prefix raises it.
ROWS = 8


def collect(config: CollectConfig) -> Folder:
    """Collect the missing answers of a data set; an interruption loses at most one batch.

    Returns:
        Folder of the data set.

    Raises:
        TrimtabError: if the configuration is invalid, the folder holds another data set, or the job fails.
        InterruptedByUserError: on SIGINT or SIGTERM, after the current batch.
    """
    base = resolve_base_model(config.base, config.revision)
    layers = tuple(sorted(set(config.layers))) or _get_default_layers(base, config.subject)
    if layers[0] < 0 or layers[-1] >= base.depth:
        raise UsageError(f"layers must be from 0 to {base.depth - 1} for {base.name}, not {list(layers)}")
    prefix = next(iter(find_prefixes(config.prefix, base).values())) if config.prefix else None
    planned = load_plan(config)
    folder, meta = open_folder(config.out), _build_metadata(config, base, layers, prefix)
    existing = begin_dataset(folder, meta)
    if extra := existing - {item.key for item in planned}:
        print_line(f"{folder} also holds {len(extra)} other rows, which stay in the data set")
    rows = max(ROWS, len(prefix.vectors) if prefix else 0)
    renderer = build_renderer(base, rows)
    new = [item for item in planned if item.key not in existing]
    missing = {item.key: item for item in _drop_overlong(new, config, renderer, prefix)}
    if missing:
        engine = EngineConfig(
            num_slots=rows, dtype=config.dtype, max_model_len=config.max_model_len, layers=layers, token_statistics=True
        )
        requests = {key: item.request for key, item in missing.items()}
        sampler = AnswerSampler(config.num_samples, config.temperature, config.p_true)
        title = "answers with signals" if config.subject == "answer" else "prompts with signals"
        pool = run_pool(title, base, requests, engine, config.scale, prefix, sampler, sampler.batch)
        stored = 0
        with ray_session(config.scale.address), closing(pool) as batches, defer_interrupt(_announce_stop) as stop_requested:
            for batch in batches:
                pairs = [(missing[key], gathered) for key, gathered in batch.items()]
                labels = label_answers([(item, gathered.answer) for item, gathered in pairs], config.judge)
                labeled = zip(pairs, labels, strict=True)
                build = build_row if config.subject == "answer" else build_prompt_row
                lines = [build(item, gathered, label, renderer.tokenizer) for (item, gathered), label in labeled]
                append_part(folder, meta, lines)
                stored += len(lines)
                if stop_requested.is_set() and stored < len(missing):
                    raise InterruptedByUserError(
                        f"stopped; {stored} of {len(missing)} rows are stored. Run the same command to resume"
                    )
    return folder


def _announce_stop() -> None:
    print_line("stopping after this batch; press Ctrl-C again to stop immediately")


def run_collect(config: CollectConfig) -> dict[str, Any]:
    """Collect a data set and print its summary.

    Returns:
        Metadata, counts and digest for `--json`.
    """
    folder = collect(config)
    data = read_dataset(folder)
    right = int((data.truthful == 1).sum())
    labeled = int((~data.truthful.isnan()).sum())
    if config.subject == "prompt":
        summary = f"{len(data.keys)} prompts, {labeled - right} harmful"
        print_line(f"{folder}: {summary}; layers {list(data.meta.layers)}; {data.digest}")
        return metadata_as_json(data.meta) | {"prompts": labeled, "harmful": labeled - right, "digest": data.digest}
    truncated = data.finished.count(False)
    summary = f"{len(data.keys)} answers, {right} of {labeled} right{f', {truncated} cut off' if truncated else ''}"
    print_line(f"{folder}: {summary}; layers {list(data.meta.layers)}; {data.digest}")
    counts = {"answers": len(data.keys), "labelled": labeled, "right": right, "cut": truncated}
    return metadata_as_json(data.meta) | counts | {"digest": data.digest}


def _drop_overlong(
    planned: Sequence[PlannedRequest], config: CollectConfig, renderer: ChatRenderer, prefix: Prefix | None
) -> list[PlannedRequest]:
    """Drop the requests that exceed the engine's length, and print their number."""
    fitting = drop_overlong(planned, config, renderer, prefix)
    if dropped := len(planned) - len(fitting):
        fitting_keys = {item.key for item in fitting}
        example = next(item for item in planned if item.key not in fitting_keys).question.question[:60]
        print_line(
            f"skipped {dropped} of {len(planned)} questions: longer than --max_model_len {config.max_model_len}, "
            f"e.g. {example!r}"
        )
    return fitting


def build_row(
    item: PlannedRequest, gathered: GatheredAnswers, label: AnswerLabel, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """Build a row of the data set, by column name.

    Raises:
        ArtifactError: if the engine returned no signals for the answer.
    """
    answer, signals = gathered.answer, _get_signals(item, gathered)
    truthful, why = label
    return {
        "key": item.key,
        "question": item.question.question,
        "source": item.question.source,
        "answer": answer.text,
        "group": item.question.prompt.group,
        "truthful": truthful,
        "why": why,
        "tokens": len(answer.token_ids),
        "whole": answer.finish_reason == "stop",
        "psi": signals.psi.flatten().tolist(),
        "history": signals.history.flatten().tolist(),
        "windows": signals.windows.flatten().numpy() if len(signals.windows) else None,
        "unfinished": signals.running.flatten().numpy() if len(signals.running) else None,
        **sample_columns(gathered.samples),
        "p_true": None if gathered.verdict is None else compute_p_true(gathered.verdict, tokenizer),
    }


def build_prompt_row(
    item: PlannedRequest, gathered: GatheredAnswers, label: AnswerLabel, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """Build a row of a data set of prompts, by column name. Arguments and exceptions as in `build_row`."""
    signals = _get_signals(item, gathered)
    states = Signals(convert_to_prompt_states(signals.psi), signals.history[:0], windows=signals.windows)
    answer = replace(gathered.answer, text="", finish_reason="stop", signals=states)
    row = build_row(item, replace(gathered, answer=answer), label, tokenizer)
    return row | {"tokens": answer.prompt_tokens, "labels": list(item.labels), "original": item.original}


def _get_signals(item: PlannedRequest, gathered: GatheredAnswers) -> Signals:
    if gathered.answer.signals is None:
        raise ArtifactError(f"the engine returned no signals for {item.question.question[:60]!r}")
    return gathered.answer.signals


def compute_p_true(verdict: Answer, tokenizer: PreTrainedTokenizerBase) -> float:
    """Compute the probability with which the model calls its answer true, from the likeliest first tokens of its verdict."""
    return p_true.compute_p_true((str(tokenizer.decode([token])), logp) for token, logp in verdict.logprobs[0].items())


def _get_default_layers(base: BaseModel, subject: Subject) -> tuple[int, ...]:
    last = base.depth - 1
    layers = [base.depth * TWO_THIRDS, last] if subject == "answer" else [base.depth * share for share in PROMPT_DEPTHS]
    return tuple(sorted({min(round(layer), last) for layer in layers}))


def _build_metadata(config: CollectConfig, base: BaseModel, layers: tuple[int, ...], prefix: Prefix | None) -> DatasetMetadata:
    sampling = {"samples": config.num_samples, "temperature": config.temperature if config.num_samples else None}
    # Stored in the data set: the names are part of its format.
    judge = {name: getattr(config.judge, name) for name in ("kind", "folder", "url", "model")}
    judge["concurrency"] = config.judge.max_concurrency
    options = {"max_tokens": config.max_tokens, "kind": config.kind, "given": config.read_answers, "judge": judge}
    options |= {"max_length": config.max_model_len, "columns": config.columns, "separator": config.answer_separator}
    unfinished = {"unfinished": True} if config.unfinished else {}
    stored_settings = json.dumps({**options, **sampling, "p_true": config.p_true, **unfinished})
    prefix_digest = prefix.card.digest if prefix else None
    # Resolved, because `auto` depends on the machine and a data set has one precision.
    precision = resolve_dtype(config.dtype)
    return DatasetMetadata(
        base.name, base.fingerprint, layers, base.width, precision, prefix_digest, stored_settings, subject=config.subject
    )
