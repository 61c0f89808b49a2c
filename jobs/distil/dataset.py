"""Dataset pipeline of the distil job: user prompts, their parts, and the answers of the teacher."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import nan
from pathlib import Path
from typing import Any

from trimtab.cli.console import print_line
from trimtab.data.hard_filter import FilterContext, FilterStep, TrainingRow, apply_hard_filter
from trimtab.data.prompt import Prompt, add_system_prompt, compute_prompts_digest, hash_to_fraction
from trimtab.data.readers import read_all_prompts
from trimtab.engine.config import EngineConfig
from trimtab.errors import UsageError
from trimtab.evaluation.rules.rule_checks import Rule
from trimtab.generation_types import Sampling
from trimtab.jobs.align.dataset import PreparedDataset
from trimtab.jobs.distil.config import AnswerPart, DistilConfig
from trimtab.jobs.distil.evaluation_requests import build_peer_requests, build_prompt_sets
from trimtab.jobs.distil.self_study import write_prompts
from trimtab.jobs.runtime.config import as_source_list
from trimtab.jobs.runtime.engine_pool import GenerationRequest
from trimtab.jobs.runtime.generation_cache import CachedAnswer, generate_cached
from trimtab.model.base_model import BaseModel
from trimtab.model.chat_template import ChatRenderer, build_renderer
from trimtab.types import FilterRule, Part
from trimtab.util.identifiers import compute_key

THINK_END = "</think>"
# Tokens of a conversation besides the system prompt: at least this many fit into the context of the engine.
CONTEXT = 1024


@dataclass(frozen=True)
class SystemPrompt:
    """System prompt to compress.

    Attributes:
        text: text of the prompt.
        tokens: its length in tokens.
        digest: digest of the text.
    """

    text: str
    tokens: int
    digest: str


def read_system_prompt(config: DistilConfig, base: BaseModel) -> SystemPrompt:
    """Read the system prompt.

    Raises:
        UsageError: if the file cannot be read or is empty, if the chat template does not support the position of the prefix, or
            if the prefix is not shorter than the prompt.
    """
    try:
        text = Path(config.system).read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise UsageError(f"reading {config.system} failed: {reason}. Give a text file with the system prompt") from error
    renderer = build_renderer(base, config.num_virtual_tokens)
    renderer.insert_slot_tokens([{"role": "user", "content": "x"}], config.position, ())
    tokens = len(renderer.tokenizer.encode(text, add_special_tokens=False))
    if tokens <= config.num_virtual_tokens:
        raise UsageError(
            f"{config.system} has {tokens} tokens, no more than num_virtual_tokens ({config.num_virtual_tokens}). Lower it"
        )
    return SystemPrompt(text, tokens, compute_key(text, 16))


def build_engine_config(config: DistilConfig, system: SystemPrompt) -> EngineConfig:
    """Build the configuration of engines whose context fits the system prompt."""
    length = max(2048, system.tokens + max(CONTEXT, 2 * config.train.max_target_tokens, 2 * config.evaluate.max_tokens))
    return EngineConfig(num_slots=1, dtype=config.dtype, max_model_len=length)


def prepare_dataset(config: DistilConfig, base: BaseModel, system: SystemPrompt, rules: Sequence[Rule]) -> PreparedDataset:
    """Read or write the user prompts, split them, and generate the answers of the teacher.

    The same engine generates the answers that the evaluation compares with, which are cached: a start takes half a minute.

    Args:
        config: settings of the job.
        base: base model, which is the teacher with the system prompt.
        system: system prompt.
        rules: rules of the system prompt.

    Raises:
        UsageError: if prompts cannot be read, or too few are left.
        TrimtabError: if generation fails.
    """
    data = config.data
    engine = build_engine_config(config, system)
    prompts = _read_prompts(config) + write_prompts(config, base, system.text, engine)
    held_out = [p.prompt for p in read_all_prompts(as_source_list(data.decontaminate_against), "benign_easy", data.columns)]
    parts = split_by_hash(prompts, data.validation_fraction, data.test_fraction, data.seed)
    test = [prompt.prompt for prompt in parts["test"]]
    rows = {part: [TrainingRow(prompt, "", 0) for prompt in parts[part]] for part in ("train", "validation")}
    enabled: list[FilterRule] = ["duplicate", "contamination"]
    filtered = apply_hard_filter(rows["train"], enabled, FilterContext(data.seed, held_out, test))
    validation = apply_hard_filter(rows["validation"], enabled, FilterContext(data.seed, held_out, test)).rows
    if empty := [name for name, left in (("train", filtered.rows), ("validation", validation), ("test", test)) if not left]:
        raise UsageError(f"no prompts are left for the {empty[0]} part. Give more data.prompts, or raise data.num_questions")
    peers = build_peer_requests(build_prompt_sets(config, rules, parts["test"]), system.text)
    later = [request for listed in peers.values() for request in listed]
    answers = _generate_answers(config, base, system, [*filtered.rows, *validation], later, engine)
    renderer = build_renderer(base, config.num_virtual_tokens)
    train, validation = (
        [_build_row(config, system, renderer, row, answers[row.prompt]) for row in part if answers[row.prompt].text]
        for part in (filtered.rows, validation)
    )
    inputs = [
        {"name": "system prompt", "digest": system.digest, "rows": system.tokens},
        {"name": "user prompts", "digest": compute_prompts_digest(prompts), "rows": len(prompts)},
    ]
    print_line(
        f"{len(train)} training prompts, {len(validation)} to validate, {len(test)} to test; {system.tokens} tokens each"
    )
    return PreparedDataset(train, validation, parts, replace(filtered, rows=train), (nan, nan), inputs)


def split_by_hash(prompts: Sequence[Prompt], validation: float, test: float, seed: int) -> dict[Part, list[Prompt]]:
    """Split prompts by a hash of their group, into train, validation and test.

    Args:
        prompts: prompts.
        validation: approximate fraction of the validation part.
        test: approximate fraction of the test part.
        seed: seed of the hash.
    """
    parts: dict[Part, list[Prompt]] = {"train": [], "validation": [], "test": []}
    for prompt in prompts:
        position = hash_to_fraction(prompt.group, seed)
        parts["test" if position < test else "validation" if position < test + validation else "train"].append(prompt)
    return parts


def count_trained_tokens(renderer: ChatRenderer, answer: str, part: AnswerPart) -> int | None:
    """Return the number of tokens of a part of an answer; None for the whole answer.

    The part `reasoning` ends at the closing tag of the reasoning; an answer without one is trained on in full.
    """
    tokens = renderer.render_answer(answer)
    if part == "first_half":
        return max(1, len(tokens) // 2)
    if part == "reasoning" and THINK_END in answer:
        reasoning = answer[: answer.index(THINK_END) + len(THINK_END)]
        return len(renderer.render_answer(reasoning)) - 1
    return None


def _read_prompts(config: DistilConfig) -> list[Prompt]:
    data = config.data
    prompts = read_all_prompts(as_source_list(data.prompts), "benign_easy", data.columns) if data.prompts else []
    # The class of a prompt has no meaning here: the teacher's answer is right in any case.
    prompts = [replace(prompt, label="benign_easy", target=None) for prompt in prompts]
    ordered = sorted(prompts, key=lambda prompt: hash_to_fraction(f"limit|{prompt.prompt}", data.seed))
    return ordered[: data.limit or len(ordered)]


def _generate_answers(
    config: DistilConfig,
    base: BaseModel,
    system: SystemPrompt,
    rows: Sequence[TrainingRow],
    later: Sequence[GenerationRequest],
    engine: EngineConfig,
) -> dict[Prompt, CachedAnswer]:
    """Return the answers of the teacher by prompt, and cache those to later requests."""
    sampling = Sampling(config.train.max_target_tokens, config.data.temperature, seed=config.data.seed, logprobs=0)
    requests = {row.prompt: GenerationRequest(add_system_prompt(row.prompt, system.text).messages, sampling) for row in rows}
    generated = generate_cached("answers of the teacher", base, [*requests.values(), *later], engine, config.scale)
    return {prompt: generated[request.key(engine.dtype)][0] for prompt, request in requests.items()}


def _build_row(
    config: DistilConfig, system: SystemPrompt, renderer: ChatRenderer, row: TrainingRow, answer: CachedAnswer
) -> TrainingRow:
    part = count_trained_tokens(renderer, answer.text, config.data.answer_part)
    # Without its end, an answer has no token that ends it: the last tokens of a truncated answer are those of its text.
    whole = None if answer.finished else max(1, len(renderer.render_answer(answer.text)) - 1)
    trained = min((count for count in (part, whole) if count is not None), default=None)
    return replace(
        row,
        target=answer.text,
        tokens=answer.tokens,
        cut=not answer.finished,
        origin="given",
        teacher_system=system.text,
        trained_tokens=trained,
    )


def describe_filter(steps: Sequence[FilterStep]) -> list[dict[str, Any]]:
    """Return the filter steps as JSON values, as counts of prompts."""
    return [{"rule": s.rule, "removed": sum(s.removed.values()), "left": sum(s.left.values())} for s in steps]
