"""Throughput, CPU time, memory and size of answers with signals: trimtab's engine, vLLM's extraction, and two passes.

python bench/collect.py [--quick] [--json FILE]

All use the same model, questions, precision and greedy answers. Each measurement runs in a process of its own, and they take
turns. Ratios are paired by round.

- `engine`: the engine without signals; `states`: with the hidden states of two layers; `signals`: also with the statistics of
  tokens.
- `extract_hidden_states`: vLLM's files of the hidden states of all tokens, from which the signals of the states are built.
- `transformers`: `generate`, and then a pass over prompt and answer, the method of white-box detector libraries. The fastest of
  several batch sizes is selected first.

Memory is that of all processes of a measurement, at its peak; and the peak of the largest process of `trimtab collect`, with
200 and with 2,000 questions.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
from peers import signal_workers
from peers.costs import list_processes
from peers.ratios import bootstrap_mean, decide_at_most

# Batch sizes of transformers, and the number of questions on which they are compared.
BATCH_SIZES, SELECTION_QUESTIONS = (16, 32, 64), 128
# Defaults of the numbers of questions and rounds, and of the batch sizes that are compared.
FULL: dict[str, Any] = {"questions": 192, "rounds": 5, "sizes": BATCH_SIZES}
QUICK: dict[str, Any] = {"questions": 100, "rounds": 1, "sizes": ()}
MEMORY_QUESTIONS, MEMORY_TOKENS, SAMPLE_SECONDS = (200, 2000), 8, 0.2
# Goals: throughput relative to peers, and growth of the memory with the questions. No goal was set for the extraction.
MIN_ENGINE_RATIO, MIN_EXTRACTION_RATIO, MIN_TWO_PASSES_RATIO, MAX_MEMORY_RATIO = 0.95, 1.0, 10.0, 1.1
UNITS = {
    "answers_per_second": "answers/s",
    "cpu_seconds_per_answer": "s/answer",
    "bytes_per_answer": "bytes/answer",
    "memory": "GiB",
}

Result = dict[str, float]


def main() -> None:
    options = parse_arguments()
    if options.worker:
        print(json.dumps(signal_workers.measure(options.worker, options.base, options.questions, options.size)))
        return
    sizes = {size: measure(f"transformers:{size}", options, SELECTION_QUESTIONS) for size in options.sizes}
    best = max(sizes, key=lambda size: sizes[size]["answers_per_second"]) if sizes else BATCH_SIZES[-1]
    two_passes = f"transformers:{best}"
    names = ["engine", "states", "signals", "extract_hidden_states", two_passes]
    results: dict[str, list[Result]] = {name: [] for name in names}
    for number in range(options.rounds):
        # The order alternates, so that no measurement always runs on the cooler machine.
        for name in names if number % 2 == 0 else reversed(names):
            results[name].append(measure(name, options, options.questions))
    lines = [
        build_ratio_line("states", "engine", results, MIN_ENGINE_RATIO),
        build_ratio_line("signals", "engine", results, MIN_ENGINE_RATIO),
        build_ratio_line("states", "extract_hidden_states", results, MIN_EXTRACTION_RATIO),
        build_ratio_line("signals", two_passes, results, MIN_TWO_PASSES_RATIO),
        *(build_line(name, key, results[name]) for name in names for key in UNITS),
        *(build_line(f"transformers:{size}", "answers_per_second", [result]) for size, result in sizes.items() if size != best),
    ]
    if not options.quick:
        lines += report_memory(options)
    print(json.dumps(lines, indent=1))
    if options.json:
        Path(options.json).write_text(json.dumps(lines, indent=1) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer questions and rounds, no memory of trimtab collect")
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, help="measurements of each, by default 5, or 1 with --quick")
    parser.add_argument("--questions", type=int, help="number of questions, by default 192, or 100 with --quick")
    parser.add_argument("--sizes", type=int, nargs="*", help="batch sizes of transformers to compare")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    for name, default in (QUICK if options.quick else FULL).items():
        if getattr(options, name) is None:
            setattr(options, name, default)
    return options


def measure(name: str, options: argparse.Namespace, questions: int) -> Result:
    """Run a measurement in a process of its own, and print it.

    Args:
        name: key of `WORKERS`, and after a colon the batch size of transformers.
        options: command-line options.
        questions: number of questions.
    """
    worker, _, size = name.partition(":")
    command = [sys.executable, __file__, "--worker", worker, "--size", size or "0"]
    command += ["--base", options.base, "--questions", str(questions)]
    output, memory = run_and_sample(name, command, sum)
    result: Result = json.loads(output.splitlines()[-1]) | {"memory": memory}
    print(f"{name}: {', '.join(f'{key} {value:.4g}' for key, value in result.items())}", flush=True)
    return result


def run_and_sample(name: str, command: list[str], combine: Callable[[list[int]], int]) -> tuple[str, float]:
    """Run a command, and combine the resident memory of its processes at each sample.

    Returns:
        The standard output, and the peak in GiB.
    """
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process, peak = psutil.Popen(command, stdout=output, stderr=errors, text=True), 0
        while process.poll() is None:
            peak = max(peak, combine([read_memory(one) for one in list_processes(process.pid)]))
            time.sleep(SAMPLE_SECONDS)
        for file in (output, errors):
            file.seek(0)
        if process.returncode:
            sys.exit(f"{name} failed:\n{errors.read()[-2000:]}")
        return output.read(), peak / 2**30


def read_memory(process: psutil.Process) -> int:
    """Return the resident memory of a process in bytes, or 0 if it has ended."""
    try:
        return process.memory_info().rss
    except psutil.Error:
        return 0


def build_ratio_line(name: str, peer: str, results: dict[str, list[Result]], goal: float) -> dict[str, Any]:
    """Build the line that compares two measurements, paired by round. A goal is met by the whole interval of the ratio."""
    line, peer_line = (build_line(one, "answers_per_second", results[one]) for one in (name, peer))
    pairs = zip(results[name], results[peer], strict=True)
    ratios = [result["answers_per_second"] / peer_result["answers_per_second"] for result, peer_result in pairs]
    low, high = bootstrap_mean(ratios)
    return line | {
        "name": f"collect.{name}.against.{peer}",
        "peer": {peer: peer_line["value"], "spread": peer_line["spread"]},
        "ratio": statistics.fmean(ratios),
        "low": low,
        "high": high,
        "goal": goal,
        "met": decide_at_most(-high, -low, -goal) if len(ratios) > 1 else None,
    }


def build_line(name: str, key: str, results: Sequence[Result]) -> dict[str, Any]:
    """Build the line of a measurement without a peer: the median of the rounds, with the lowest and the highest value."""
    values = [result[key] for result in results]
    line = {"name": f"collect.{name}.{key}", "value": statistics.median(values), "unit": UNITS[key]}
    return line | {"spread": [min(values), max(values)]} | dict.fromkeys(("peer", "ratio", "goal", "met"))


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
        texts = [conversation.messages[-1]["content"] for conversation in signal_workers.build_conversations(count)]
        questions.write_text("\n".join(json.dumps({"question": text, "answers": ["x"]}) for text in texts))
        command = [sys.executable, "-m", "trimtab", "collect", "--questions", str(questions), "--out", f"{folder}/out"]
        command += ["--base", options.base, "--max_tokens", str(MEMORY_TOKENS), "--dtype", "fp32"]
        return run_and_sample("trimtab collect", command, max)[1]


if __name__ == "__main__":
    main()
