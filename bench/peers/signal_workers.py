"""Measurements of answers with signals, each of which runs in a process of its own."""

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peers.costs import divide_increase, read_cpu_seconds
from peers.servers import VLLM_ENVIRONMENT

from trimtab.data.questions import read_questions
from trimtab.detection.signals import compute_token_statistics, concatenate_states
from trimtab.engine.config import EngineConfig
from trimtab.generation_types import Conversation, Sampling
from trimtab.model.base_model import BaseModel, resolve_base_model
from trimtab.model.chat_template import ChatRenderer, build_renderer

# The engine's process loads the connector from a module of this folder.
BENCH = Path(__file__).parent.parent
LAYERS, ANSWER_TOKENS = (20, 29), 48
SLOTS, WARM_UP_QUESTIONS, WARM_UP_TOKENS = 8, 16, 8

Generate = Callable[[Sequence[Conversation]], list[int]]
"""Takes conversations, returns the lengths of the answers in tokens."""


def measure(name: str, model: str, questions: int, size: int) -> dict[str, float]:
    """Measure answers with one method in this process, without its loading.

    Args:
        name: key of `WORKERS`.
        model: name of the base model.
        questions: number of questions.
        size: batch size of transformers.

    Returns:
        Answers per second, seconds of CPU time per answer, and bytes of the signals per answer.
    """
    with tempfile.TemporaryDirectory(prefix="collect-") as folder:
        return WORKERS[name](resolve_base_model(model), build_conversations(questions + WARM_UP_QUESTIONS), size, Path(folder))


def build_conversations(count: int) -> list[Conversation]:
    """Build conversations of one question each, all different."""
    questions = [question.prompt.messages[-1]["content"] for question in read_questions("trimtab:countries")]
    rounds = -(-count // len(questions))
    texts = [text if number == 0 else f"{text} (Question {number}.)" for number in range(rounds) for text in questions]
    return [Conversation([{"role": "user", "content": text}]) for text in texts[:count]]


def measure_engine(
    base: BaseModel, conversations: Sequence[Conversation], layers: tuple[int, ...] = (), *, statistics: bool = False
) -> dict[str, float]:
    """Measure the engine, with the signals of the given layers and with or without the statistics of tokens."""
    # vLLM is needed for this measurement only.
    from trimtab.engine.offline import Engine

    config, stored = EngineConfig(num_slots=SLOTS, dtype="fp32", layers=layers, token_statistics=statistics), [0]
    with Engine(base, config) as engine:
        engine.chat_many(conversations[-WARM_UP_QUESTIONS:], Sampling(max_tokens=WARM_UP_TOKENS))

        def generate(batch: Sequence[Conversation]) -> list[int]:
            answers = [answer for (answer,) in engine.chat_many(batch, Sampling(max_tokens=ANSWER_TOKENS))]
            signals = [answer.signals for answer in answers if answer.signals is not None]
            stored[0] = sum(entry.psi.nbytes + entry.history.nbytes for entry in signals)
            return [len(answer.token_ids) for answer in answers]

        return measure_throughput(generate, conversations[:-WARM_UP_QUESTIONS], lambda: stored[0])


def measure_extraction(base: BaseModel, conversations: Sequence[Conversation], folder: Path) -> dict[str, float]:
    """Measure `extract_hidden_states` of vLLM: the states of all tokens in one file per answer, from which signals follow."""
    # vLLM is needed for this measurement only.
    from peers.hidden_states import build_arguments, extract_states
    from vllm import LLM

    renderer = build_renderer(base, SLOTS)
    # The engine needs a process of its own: in this one, it would not write the states of the last answers.
    os.environ |= VLLM_ENVIRONMENT | {"PYTHONPATH": os.pathsep.join([str(BENCH), os.environ.get("PYTHONPATH", "")])}
    llm = LLM(**build_arguments(base, EngineConfig(), LAYERS, folder), disable_log_stats=True)
    prompts = [renderer.render_prompt(conversation.messages) for conversation in conversations]
    extract_states(llm, prompts[-WARM_UP_QUESTIONS:], WARM_UP_TOKENS)
    for path in folder.iterdir():
        path.unlink()

    def generate(batch: Sequence[Conversation]) -> list[int]:
        batch_prompts = prompts[: len(batch)]
        answers = extract_states(llm, batch_prompts, ANSWER_TOKENS)
        for prompt, (tokens, states) in zip(batch_prompts, answers, strict=True):
            if len(states) != len(prompt) + len(tokens) - 1:
                raise ValueError(f"{len(states)} states of {len(prompt)} tokens of a prompt and {len(tokens)} of an answer")
            concatenate_states(states[-1], states[len(prompt) - 1 :].mean(0), states[: len(prompt)].mean(0))
        return [len(tokens) for tokens, _ in answers]

    def count_bytes() -> int:
        return sum(path.stat().st_size for path in folder.iterdir())

    try:
        return measure_throughput(generate, conversations[:-WARM_UP_QUESTIONS], count_bytes)
    finally:
        llm.llm_engine.engine_core.shutdown()


def measure_transformers(base: BaseModel, conversations: Sequence[Conversation], size: int) -> dict[str, float]:
    """Measure transformers in two passes, with a batch size."""
    renderer, model, stored = build_renderer(base, SLOTS), base.load("fp32"), [0]
    run_two_passes(model, renderer, [renderer.render_prompt(one.messages) for one in conversations[-4:]])

    def generate(batch: Sequence[Conversation]) -> list[int]:
        # Prompts of similar length share a batch, because the model computes padding as well.
        ordered = sorted((renderer.render_prompt(conversation.messages) for conversation in batch), key=len)
        results = [run_two_passes(model, renderer, ordered[start : start + size]) for start in range(0, len(ordered), size)]
        stored[0] = sum(number for _, number in results)
        return [length for lengths, _ in results for length in lengths]

    return measure_throughput(generate, conversations[:-WARM_UP_QUESTIONS], lambda: stored[0])


@torch.no_grad()
def run_two_passes(model: Any, renderer: ChatRenderer, prompts: Sequence[list[int]]) -> tuple[list[int], int]:
    """Generate the answers of a batch and compute their signals in a second pass.

    Returns:
        Lengths of the answers in tokens, and the size of their signals in bytes.
    """
    end, longest = renderer.turn_end, max(map(len, prompts))
    ids = torch.tensor([[end] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    generated = model.generate(
        ids, attention_mask=mask, max_new_tokens=ANSWER_TOKENS, do_sample=False, eos_token_id=end, pad_token_id=end
    )[:, longest:]
    stops = (generated == end).long()
    lengths = [int(row.argmax()) + 1 if row.any() else len(row) for row in stops]
    full_mask = torch.cat([mask, torch.ones_like(generated)], 1)
    outputs = model(torch.cat([ids, generated], 1), attention_mask=full_mask, output_hidden_states=True)
    states = torch.stack([outputs.hidden_states[layer] for layer in LAYERS], 2)
    stored = 0
    for index, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        answer_states = states[index, longest - 1 : longest - 1 + length]
        prompt_states = states[index, longest - len(prompt) : longest]
        psi = concatenate_states(answer_states[-1], answer_states.mean(0), prompt_states.mean(0))
        logits = outputs.logits[index, longest - 1 : longest - 1 + length]
        statistics = compute_token_statistics(logits, generated[index, :length])
        stored += psi.nbytes + statistics.logp.nbytes + statistics.entropy.nbytes + statistics.margin.nbytes
    return lengths, stored


def measure_throughput(
    generate: Generate, conversations: Sequence[Conversation], count_bytes: Callable[[], int]
) -> dict[str, float]:
    """Measure a function that generates answers."""
    before, start = read_cpu_seconds(os.getpid()), time.monotonic()
    lengths = generate(conversations)
    seconds = time.monotonic() - start
    roles = divide_increase(before, read_cpu_seconds(os.getpid()), len(lengths))
    return {
        "answers_per_second": len(lengths) / seconds,
        "cpu_seconds_per_answer": sum(roles.values()),
        "bytes_per_answer": count_bytes() / len(lengths),
        "tokens_per_answer": sum(lengths) / len(lengths),
    }


WORKERS: dict[str, Callable[[BaseModel, Sequence[Conversation], int, Path], dict[str, float]]] = {
    "engine": lambda base, conversations, size, folder: measure_engine(base, conversations),
    "states": lambda base, conversations, size, folder: measure_engine(base, conversations, LAYERS),
    "signals": lambda base, conversations, size, folder: measure_engine(base, conversations, LAYERS, statistics=True),
    "extract_hidden_states": lambda base, conversations, size, folder: measure_extraction(base, conversations, folder),
    "transformers": lambda base, conversations, size, folder: measure_transformers(base, conversations, size),
}
