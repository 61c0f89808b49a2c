"""Answers with signals per second: trimtab's engine against itself without signals, and against transformers in two passes.

python bench/collect.py [--quick] [--json FILE]

The same model, questions, type and greedy answers for all; each measurement is a process of its own, and they take turns. A
ratio is the median of those of the rounds. The peer is what white-box detector libraries do: `generate`, then a second pass
over prompt and answer for the hidden states, at the batch size that suits it best, which is looked for first. Memory is that
of `trimtab collect`, of its largest process, with few questions and many.
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

LAYERS, TOKENS = (20, 29), 48
BATCHES = (16, 32, 64)
# Questions that are enough to find the best of them.
TRIAL = 128
# Shares of the engine's speed that signals may leave, and how many times as fast as two passes they should be.
KEPT, TIMES = 0.95, 10.0
# Memory counts as flat within this.
FLAT = 1.1


def main() -> None:
    options = arguments()
    if options.worker:
        print(json.dumps(WORKERS[options.worker](options)))
        return
    sizes: dict[int, dict[str, float]] = {
        size: measure(f"transformers:{size}", options, TRIAL) for size in ([] if options.quick else BATCHES)
    }
    for size, measured in sizes.items():
        print(f"transformers, batches of {size}: {measured}", flush=True)
    best = max(sizes, key=lambda size: sizes[size]["answers_per_second"]) if sizes else BATCHES[-1]
    names = ["engine", "signals", f"transformers:{best}"]
    results: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for number in range(options.rounds):
        # In turns, and back again, so that none has the cooler machine.
        for name in names if number % 2 == 0 else reversed(names):
            results[name].append(measure(name, options, options.questions))
            print(f"{number + 1}/{options.rounds} {name}: {results[name][-1]}", flush=True)
    lines = [
        line("collect.against_the_engine_alone", results, "engine", KEPT),
        line("collect.against_two_passes", results, f"transformers:{best}", TIMES),
        *(alone(f"collect.transformers:{size}", measured) for size, measured in sizes.items() if size != best),
    ]
    if not options.quick:
        lines += memory(options)
    print(json.dumps(lines, indent=1))
    if options.json:
        Path(options.json).write_text(json.dumps(lines, indent=1) + "\n")


def arguments() -> argparse.Namespace:
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
        options.questions, options.rounds = min(options.questions, 100), 1
    return options


def measure(name: str, options: argparse.Namespace, questions: int) -> dict[str, float]:
    worker, _, size = name.partition(":")
    command = [sys.executable, __file__, "--worker", worker, "--size", size or "0"]
    command += ["--base", options.base, "--questions", str(questions)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def asks(count: int) -> list[Conversation]:
    """So many questions, no two the same."""
    known = [q.prompt.messages[-1]["content"] for q in read_questions("trimtab:countries")]
    texts = [text if turn == 0 else f"{text} (Question {turn}.)" for turn in range(-(-count // len(known))) for text in known]
    return [Conversation([{"role": "user", "content": text}]) for text in texts[:count]]


def engine(options: argparse.Namespace, layers: tuple[int, ...] = ()) -> dict[str, float]:
    from trimtab.engine.offline import Engine

    given = asks(options.questions + 16)
    config = EngineConfig(num_slots=8, dtype="fp32", layers=layers, token_statistics=bool(layers))
    with Engine(options.base, config) as started:
        started.chat_many(given[-16:], Sampling(max_tokens=8))
        return timed(lambda: [len(several[0].token_ids) for several in answered(started, given[:-16])])


def answered(started: Any, given: Sequence[Conversation]) -> Any:
    return started.chat_many(given, Sampling(max_tokens=TOKENS))


def transformers(options: argparse.Namespace) -> dict[str, float]:
    base = resolve_base_model(options.base)
    renderer, model = build_renderer(base, 8), base.load("fp32")
    prompts = [renderer.render_prompt(ask.messages) for ask in asks(options.questions)]
    two_passes(model, renderer, prompts[:4])

    def work() -> list[int]:
        # Of like lengths beside each other, as padding is work for nothing.
        ordered = sorted(prompts, key=len)
        batches = [ordered[at : at + options.size] for at in range(0, len(ordered), options.size)]
        return [length for batch in batches for length in two_passes(model, renderer, batch)]

    return timed(work)


@torch.no_grad()
def two_passes(model: Any, renderer: ChatRenderer, prompts: Sequence[list[int]]) -> list[int]:
    """Answer a batch, then read prompts and answers for the same signals; gives the answers' lengths."""
    end, longest = renderer.turn_end, max(map(len, prompts))
    ids = torch.tensor([[end] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    written = model.generate(
        ids, attention_mask=mask, max_new_tokens=TOKENS, do_sample=False, eos_token_id=end, pad_token_id=end
    )[:, longest:]
    stops = (written == end).long()
    lengths = [int(row.argmax()) + 1 if row.any() else len(row) for row in stops]
    whole = torch.cat([mask, torch.ones_like(written)], 1)
    seen = model(torch.cat([ids, written], 1), attention_mask=whole, output_hidden_states=True)
    states = torch.stack([seen.hidden_states[layer] for layer in LAYERS], 2)
    for at, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        own = states[at, longest - 1 : longest - 1 + length]
        concatenate_states(own[-1], own.mean(0), states[at, longest - len(prompt) : longest].mean(0))
        compute_token_statistics(seen.logits[at, longest - 1 : longest - 1 + length], written[at, :length])
    return lengths


def timed(work: Callable[[], list[int]]) -> dict[str, float]:
    began = time.monotonic()
    lengths = work()
    seconds = time.monotonic() - began
    return {"answers_per_second": len(lengths) / seconds, "tokens_per_second": sum(lengths) / seconds, "answers": len(lengths)}


WORKERS: dict[str, Callable[[argparse.Namespace], dict[str, float]]] = {
    "engine": engine,
    "signals": lambda options: engine(options, LAYERS),
    "transformers": transformers,
}


def line(name: str, results: dict[str, list[dict[str, float]]], peer: str, goal: float) -> dict[str, Any]:
    """The engine with signals beside a peer: medians, and the median of the rounds' ratios."""
    mine, theirs = speeds(results["signals"]), speeds(results[peer])
    ratios = [a / b for a, b in zip(mine, theirs, strict=True)]
    ratio = statistics.median(ratios)
    return {
        "name": name,
        "value": statistics.median(mine),
        "unit": "answers/s",
        "spread": [min(mine), max(mine)],
        "peer": {peer: statistics.median(theirs), "spread": [min(theirs), max(theirs)]},
        "ratio": ratio,
        "ratio_spread": [min(ratios), max(ratios)],
        "goal": goal,
        "met": ratio >= goal,
    }


def alone(name: str, measured: dict[str, float]) -> dict[str, Any]:
    return {"name": name, "value": measured["answers_per_second"], "unit": "answers/s"} | dict.fromkeys(
        ("peer", "ratio", "goal", "met")
    )


def speeds(measured: Sequence[dict[str, float]]) -> list[float]:
    return [one["answers_per_second"] for one in measured]


def memory(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Peak memory of the collect job's largest process with 200 and 2,000 questions."""
    few, many = (peak(options, count) for count in (200, 2000))
    return [
        {"name": "collect.memory", "value": many, "unit": "GiB with 2,000 questions", "peer": {"200 questions": few}}
        | {"ratio": many / few, "goal": FLAT, "met": many / few <= FLAT}
    ]


def peak(options: argparse.Namespace, count: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        questions = Path(folder) / "questions.jsonl"
        rows = [{"question": ask.messages[-1]["content"], "answers": ["x"]} for ask in asks(count)]
        questions.write_text("\n".join(map(json.dumps, rows)))
        command = [sys.executable, "-m", "trimtab", "collect", "--questions", str(questions), "--out", f"{folder}/out"]
        command += ["--base", options.base, "--max_tokens", "8", "--dtype", "fp32"]
        job, highest = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL), 0
        while job.poll() is None:
            highest = max(highest, *(resident(process) for process in [job, *job.children(recursive=True)]))
            time.sleep(0.2)
        if job.returncode:
            sys.exit(f"trimtab collect ended with {job.returncode}")
    return highest / 2**30


def resident(process: psutil.Process) -> int:
    try:
        return process.memory_info().rss
    except psutil.Error:
        return 0


if __name__ == "__main__":
    main()
