"""Throughput of answers with signals: the engine, the engine without signals, and transformers in two passes.

python bench/collect.py [--quick] [--json FILE]

All use the same model, questions, precision and greedy answers. Each measurement runs in a process of its own, and they take
turns. A ratio is the median of the ratios of the rounds. White-box detector libraries work in two passes: `generate`, and then
a pass over prompt and answer for the hidden states. The fastest of several batch sizes is selected first. Memory is the peak of
the largest process of `trimtab collect`, with 200 and with 2,000 questions.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from trimtab.data.questions import read_questions
from trimtab.detection.signals import compute_token_statistics, concatenate_states
from trimtab.engine.config import EngineConfig
from trimtab.generation_types import Conversation, Sampling
from trimtab.model.base_model import resolve_base_model
from trimtab.model.chat_template import ChatRenderer, build_renderer

LAYERS, ANSWER_TOKENS = (20, 29), 48
QUICK_QUESTIONS, WARM_UP_QUESTIONS, WARM_UP_TOKENS = 100, 16, 8
# Batch sizes of transformers, and the number of questions on which they are compared.
BATCH_SIZES, SELECTION_QUESTIONS = (16, 32, 64), 128
MEMORY_QUESTIONS, MEMORY_TOKENS, SAMPLE_SECONDS = (200, 2000), 8, 0.2
# Goals: throughput relative to the engine without signals and to two passes, and growth of the memory with the questions.
MIN_ENGINE_RATIO, MIN_TWO_PASSES_RATIO, MAX_MEMORY_RATIO = 0.95, 10.0, 1.1


def main() -> None:
    options = parse_arguments()
    if options.worker:
        print(json.dumps(WORKERS[options.worker](options)))
        return
    sizes: dict[int, dict[str, float]] = {
        size: run_measurement(f"transformers:{size}", options, SELECTION_QUESTIONS)
        for size in ([] if options.quick else BATCH_SIZES)
    }
    for size, result in sizes.items():
        print(f"transformers, batches of {size}: {result}", flush=True)
    best = max(sizes, key=lambda size: sizes[size]["answers_per_second"]) if sizes else BATCH_SIZES[-1]
    names = ["engine", "signals", f"transformers:{best}"]
    results: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for number in range(options.rounds):
        # The order alternates, so that no measurement always runs on the cooler machine.
        for name in names if number % 2 == 0 else reversed(names):
            results[name].append(run_measurement(name, options, options.questions))
            print(f"{number + 1}/{options.rounds} {name}: {results[name][-1]}", flush=True)
    lines = [
        build_ratio_line("collect.against_the_engine_alone", results, "engine", MIN_ENGINE_RATIO),
        build_ratio_line("collect.against_two_passes", results, f"transformers:{best}", MIN_TWO_PASSES_RATIO),
        *(build_line(f"collect.transformers:{size}", result) for size, result in sizes.items() if size != best),
    ]
    if not options.quick:
        lines += report_memory(options)
    print(json.dumps(lines, indent=1))
    if options.json:
        Path(options.json).write_text(json.dumps(lines, indent=1) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few questions, one round, no memory")
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each")
    parser.add_argument("--questions", type=int, default=192)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.questions, options.rounds = min(options.questions, QUICK_QUESTIONS), 1
    return options


def run_measurement(name: str, options: argparse.Namespace, questions: int) -> dict[str, float]:
    """Run a measurement in a process of its own.

    Args:
        name: key of `WORKERS`, and after a colon the batch size of transformers.
        options: command-line options.
        questions: number of questions.
    """
    worker, _, size = name.partition(":")
    command = [sys.executable, __file__, "--worker", worker, "--size", size or "0"]
    command += ["--base", options.base, "--questions", str(questions)]
    completed = subprocess.run(command, capture_output=True, text=True, check=False)
    if completed.returncode:
        sys.exit(f"{name} failed:\n{completed.stderr[-2000:]}")
    return json.loads(completed.stdout.splitlines()[-1])


def build_conversations(count: int) -> list[Conversation]:
    """Build conversations of one question each, all different."""
    questions = [question.prompt.messages[-1]["content"] for question in read_questions("trimtab:countries")]
    rounds = -(-count // len(questions))
    texts = [text if number == 0 else f"{text} (Question {number}.)" for number in range(rounds) for text in questions]
    return [Conversation([{"role": "user", "content": text}]) for text in texts[:count]]


def measure_engine(options: argparse.Namespace, layers: tuple[int, ...] = ()) -> dict[str, float]:
    """Measure the engine, with the signals of the given layers."""
    # vLLM is needed for this measurement only.
    from trimtab.engine.offline import Engine

    conversations = build_conversations(options.questions + WARM_UP_QUESTIONS)
    config = EngineConfig(num_slots=8, dtype="fp32", layers=layers, token_statistics=bool(layers))
    with Engine(options.base, config) as engine:
        engine.chat_many(conversations[-WARM_UP_QUESTIONS:], Sampling(max_tokens=WARM_UP_TOKENS))

        def generate() -> list[int]:
            answers = engine.chat_many(conversations[:-WARM_UP_QUESTIONS], Sampling(max_tokens=ANSWER_TOKENS))
            return [len(samples[0].token_ids) for samples in answers]

        return measure_throughput(generate)


def measure_transformers(options: argparse.Namespace) -> dict[str, float]:
    """Measure transformers in two passes, with the batch size of the options."""
    base = resolve_base_model(options.base)
    renderer, model = build_renderer(base, 8), base.load("fp32")
    conversations = build_conversations(options.questions)
    prompts = [renderer.render_prompt(conversation.messages) for conversation in conversations]
    run_two_passes(model, renderer, prompts[:4])

    def generate() -> list[int]:
        # Prompts of similar length share a batch, because the model computes padding as well.
        ordered = sorted(prompts, key=len)
        batches = [ordered[start : start + options.size] for start in range(0, len(ordered), options.size)]
        return [length for batch in batches for length in run_two_passes(model, renderer, batch)]

    return measure_throughput(generate)


@torch.no_grad()
def run_two_passes(model: Any, renderer: ChatRenderer, prompts: Sequence[list[int]]) -> list[int]:
    """Generate the answers of a batch, compute their signals in a second pass, and return the lengths of the answers."""
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
    for index, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        answer_states = states[index, longest - 1 : longest - 1 + length]
        prompt_states = states[index, longest - len(prompt) : longest]
        concatenate_states(answer_states[-1], answer_states.mean(0), prompt_states.mean(0))
        compute_token_statistics(outputs.logits[index, longest - 1 : longest - 1 + length], generated[index, :length])
    return lengths


def measure_throughput(generate: Callable[[], list[int]]) -> dict[str, float]:
    """Measure a function that generates answers and returns their lengths in tokens."""
    start = time.monotonic()
    lengths = generate()
    seconds = time.monotonic() - start
    return {"answers_per_second": len(lengths) / seconds, "tokens_per_second": sum(lengths) / seconds, "answers": len(lengths)}


WORKERS: dict[str, Callable[[argparse.Namespace], dict[str, float]]] = {
    "engine": measure_engine,
    "signals": lambda options: measure_engine(options, LAYERS),
    "transformers": measure_transformers,
}


def build_ratio_line(name: str, results: dict[str, list[dict[str, float]]], peer: str, goal: float) -> dict[str, Any]:
    """Build the line that compares the engine with signals with a peer, paired by round."""
    rates, peer_rates = list_rates(results["signals"]), list_rates(results[peer])
    ratios = [rate / peer_rate for rate, peer_rate in zip(rates, peer_rates, strict=True)]
    ratio = statistics.median(ratios)
    return {
        "name": name,
        "value": statistics.median(rates),
        "unit": "answers/s",
        "spread": [min(rates), max(rates)],
        "peer": {peer: statistics.median(peer_rates), "spread": [min(peer_rates), max(peer_rates)]},
        "ratio": ratio,
        "ratio_spread": [min(ratios), max(ratios)],
        "goal": goal,
        "met": ratio >= goal,
    }


def build_line(name: str, result: dict[str, float]) -> dict[str, Any]:
    """Build the line of a measurement without a peer."""
    return {"name": name, "value": result["answers_per_second"], "unit": "answers/s"} | dict.fromkeys(
        ("peer", "ratio", "goal", "met")
    )


def list_rates(results: Sequence[dict[str, float]]) -> list[float]:
    """List the answers per second of measurements."""
    return [result["answers_per_second"] for result in results]


def report_memory(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure the memory of `trimtab collect` with few and with many questions, and build the line of the ratio."""
    peer_peak, peak = (measure_peak_memory(options, count) for count in MEMORY_QUESTIONS)
    ratio = peak / peer_peak
    return [
        {"name": "collect.memory", "value": peak, "unit": "GiB with 2,000 questions", "peer": {"200 questions": peer_peak}}
        | {"ratio": ratio, "goal": MAX_MEMORY_RATIO, "met": ratio <= MAX_MEMORY_RATIO}
    ]


def measure_peak_memory(options: argparse.Namespace, count: int) -> float:
    """Run `trimtab collect` and return the peak memory of its largest process in GiB."""
    with tempfile.TemporaryDirectory() as folder:
        questions = Path(folder) / "questions.jsonl"
        texts = [conversation.messages[-1]["content"] for conversation in build_conversations(count)]
        questions.write_text("\n".join(json.dumps({"question": text, "answers": ["x"]}) for text in texts))
        command = [sys.executable, "-m", "trimtab", "collect", "--questions", str(questions), "--out", f"{folder}/out"]
        command += ["--base", options.base, "--max_tokens", str(MEMORY_TOKENS), "--dtype", "fp32"]
        job, peak = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL), 0
        while job.poll() is None:
            peak = max(peak, *(read_memory(process) for process in [job, *job.children(recursive=True)]))
            time.sleep(SAMPLE_SECONDS)
        if job.returncode:
            sys.exit(f"trimtab collect ended with {job.returncode}")
    return peak / 2**30


def read_memory(process: psutil.Process) -> int:
    """Return the resident memory of a process in bytes, or 0 if it has ended."""
    try:
        return process.memory_info().rss
    except psutil.Error:
        return 0


if __name__ == "__main__":
    main()
