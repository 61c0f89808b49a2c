"""Comparison of trimtab with lm-polygraph and uqlm: time and AUROC of risks of made-up answers.

python bench/libraries.py --lm-polygraph PYTHON --uqlm PYTHON [--samples 5] [--quick] [--json FILE]

All libraries get the same questions and the same model. Each library runs in its own environment, and `PYTHON` is the
interpreter of this environment; docs/benchmarks/detect.md explains the setup. The libraries are used as in their documentation:
lm-polygraph over transformers, and uqlm over an OpenAI endpoint, here vLLM's own server. Times are those of complete commands
and include loading. All answers are marked with the same rules. AUROC is the mean over the test parts of the five seeds on
which trimtab's detectors are tested.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peers import servers
from peers.servers import Server

from trimtab import heads
from trimtab.data.questions import Question, read_questions
from trimtab.detection.signal_dataset import read_dataset
from trimtab.jobs.detect.model_selection import split_by_seed
from trimtab.judges.answer_matching import mark_answer
from trimtab.model.base_model import resolve_base_model

PEERS = Path(__file__).parent / "peers"
SOURCE, TOKENS, SEEDS = "trimtab:countries", 24, 5
# Batch size of lm-polygraph: the best of 16, 32 and 64 in this benchmark.
BATCH_SIZE = 64


@dataclass(frozen=True)
class Measurement:
    """Results of one library.

    Attributes:
        seconds: duration of its commands.
        auroc: AUROC on the test part of each seed, by the name of the score.
        extra: additional fields of the line in the report.
    """

    seconds: float
    auroc: dict[str, list[float]]
    extra: dict[str, float] = field(default_factory=dict[str, float])


def main() -> None:
    options = parse_arguments()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        measurement, test_indices, questions = measure_trimtab(options, folder)
        measurements = {"trimtab": measurement}
        for library, python, measure in (
            ("lm-polygraph", options.lm_polygraph, measure_lm_polygraph),
            ("uqlm", options.uqlm, measure_uqlm),
        ):
            if not python:
                continue
            print(f"{library} ...", flush=True)
            try:
                measurements[library] = measure(options, python, questions, test_indices, folder)
            except RuntimeError as error:
                print(f"{library}: {error}", flush=True)
    lines = build_report(measurements, len(questions))
    print(json.dumps(lines, indent=1))
    if options.json:
        Path(options.json).write_text(json.dumps(lines, indent=1) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lm-polygraph", help="Python of an environment that has lm-polygraph")
    parser.add_argument("--uqlm", help="Python of an environment that has uqlm and langchain-openai")
    parser.add_argument("--samples", type=int, default=0, help="sampled answers per question, for the scores that need them")
    parser.add_argument("--quick", action="store_true", help="200 questions")
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--base", default="smollm2-135m")
    return parser.parse_args()


def measure_trimtab(options: argparse.Namespace, folder: Path) -> tuple[Measurement, dict[int, torch.Tensor], list[Question]]:
    """Collect signals and train detectors with trimtab.

    Args:
        options: options of the command line.
        folder: folder of the signals and of the report of the detectors.

    Returns:
        Results, indices of the test questions of each seed, and the questions in the order of these indices.
    """
    print("trimtab ...", flush=True)
    signals, detect_report = folder / "signals", folder / "detect.json"
    common = ["--base", options.base]
    collect = ["collect", "--questions", SOURCE, "--out", str(signals), "--max_tokens", str(TOKENS), "--dtype", "fp32"]
    collect += ["--num_samples", str(options.samples), "--limit", "200" if options.quick else "0"]
    collect_seconds = time_command([sys.executable, "-m", "trimtab", *collect, *common])
    detect = ["detect", "--signals", str(signals), "--head", "flag", "mlp", "linear"]
    detect += ["--register", "false", "--num_seeds", str(SEEDS), "--json", str(detect_report)]
    detect_seconds = time_command([sys.executable, "-m", "trimtab", *detect, *common])
    data = read_dataset(signals)
    splits = split_by_seed(data, SEEDS, 0.1, 0.25)
    questions = {question.question: question for question in read_questions(SOURCE)}
    report = json.loads(detect_report.read_text())
    auroc = {head["name"]: [seed["auroc"] for seed in head["seeds"]] for head in [report, *report["rivals"]]}
    measurement = Measurement(collect_seconds, auroc, {"learning": detect_seconds})
    test_indices = {seed: split.test_indices for seed, split in splits.items()}
    return measurement, test_indices, [questions[text] for text in data.questions]


def measure_lm_polygraph(
    options: argparse.Namespace,
    python: str,
    questions: Sequence[Question],
    test_indices: dict[int, torch.Tensor],
    folder: Path,
) -> Measurement:
    """Measure lm-polygraph over transformers."""
    model = str(resolve_base_model(options.base).path)
    task = {"model": model, "batch": BATCH_SIZE, "samples": options.samples}
    return measure_script(python, "with_lm_polygraph.py", task, questions, test_indices, folder)


def measure_uqlm(
    options: argparse.Namespace,
    python: str,
    questions: Sequence[Question],
    test_indices: dict[int, torch.Tensor],
    folder: Path,
) -> Measurement:
    """Measure uqlm over vLLM's own server, with the start of the server."""
    start = time.monotonic()
    command = servers.build_vllm_command(str(resolve_base_model(options.base).path), "base", "--max-model-len", "2048")
    with servers.run_server(Server("vllm", command, environment=servers.VLLM_ENVIRONMENT)) as up:
        start_seconds = time.monotonic() - start
        task = {"model": "base", "url": f"{up.url}/v1", "samples": options.samples}
        measurement = measure_script(python, "with_uqlm.py", task, questions, test_indices, folder)
    return Measurement(measurement.seconds + start_seconds, measurement.auroc, measurement.extra)


def measure_script(
    python: str,
    script: str,
    task: dict[str, Any],
    questions: Sequence[Question],
    test_indices: dict[int, torch.Tensor],
    folder: Path,
) -> Measurement:
    """Run the script of a library, mark its answers, and compute the AUROC of each of its scores.

    Args:
        python: interpreter of the environment of the library.
        script: file name of the script.
        task: task of the script without questions.
        questions: the questions.
        test_indices: indices of the test questions of each seed.
        folder: folder of the task and of the result.
    """
    task_path, result_path = folder / "task.json", folder / "result.json"
    texts = [question.prompt.messages[-1]["content"] for question in questions]
    task_path.write_text(json.dumps(task | {"questions": texts, "max_tokens": TOKENS}))
    seconds = time_command([python, str(PEERS / script), str(task_path), str(result_path)])
    result = json.loads(result_path.read_text())
    pairs = zip(questions, result["answers"], strict=True)
    labels = torch.tensor([float(mark_answer(q.kind or "contains", answer, q.answers).right) for q, answer in pairs])
    auroc = {
        name: [heads.compute_auroc(torch.tensor(values)[indices], labels[indices]) for indices in test_indices.values()]
        for name, values in result["scores"].items()
    }
    return Measurement(seconds, auroc, {"right": labels.mean().item()})


def time_command(command: Sequence[str]) -> float:
    """Run a command and return its duration in seconds; raise RuntimeError with its last output if it fails."""
    start = time.monotonic()
    completed = subprocess.run(command, capture_output=True, text=True, check=False)
    if completed.returncode:
        raise RuntimeError(f"{' '.join(command[:3])} failed:\n{completed.stderr[-3000:]}")
    return time.monotonic() - start


def build_report(measurements: dict[str, Measurement], questions: int) -> list[dict[str, Any]]:
    """Build the lines of the time and the scores of each library.

    Args:
        measurements: results by library.
        questions: number of questions.
    """
    reference = measurements["trimtab"].seconds
    lines: list[dict[str, Any]] = []
    for library, measurement in measurements.items():
        seconds = measurement.seconds
        lines.append(
            {"name": f"libraries.{library}.seconds", "value": seconds, "unit": f"s for {questions} questions"}
            | {"peer": {"trimtab": reference}, "ratio": seconds / reference, "goal": None, "met": None}
            | measurement.extra
        )
        lines += [
            {"name": f"libraries.{library}.{name}", "value": statistics.mean(values), "unit": "AUROC"}
            | {"spread": [min(values), max(values)], "peer": None, "ratio": None, "goal": None, "met": None}
            for name, values in measurement.auroc.items()
        ]
    return lines


if __name__ == "__main__":
    main()
