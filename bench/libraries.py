"""Risks of made-up answers: trimtab beside lm-polygraph and uqlm, same questions, same model, time and AUROC.

python bench/libraries.py --lm-polygraph PYTHON --uqlm PYTHON [--samples 5] [--quick] [--json FILE]

Each library runs in an environment of its own (`PYTHON` is its interpreter; docs/benchmarks/detect.md says how to make it) and
is used as its documentation does: lm-polygraph over transformers, uqlm over an OpenAI endpoint, here vLLM's own server.
A time is that of whole commands, loading included. All answers are judged alike; AUROC is the mean over the test parts of
five seeds, those that trimtab's detectors are tested on.
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
# What lm-polygraph answers at once: the best of 16, 32 and 64 here.
BATCH = 64


@dataclass(frozen=True)
class Measured:
    """One library: seconds of its commands, and AUROC on each seed's test part by the name of a score."""

    seconds: float
    auroc: dict[str, list[float]]
    extra: dict[str, float] = field(default_factory=dict[str, float])


def main() -> None:
    options = arguments()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ours, parts, questions = trimtab(options, folder)
        found = {"trimtab": ours}
        for peer, python, run in (
            ("lm-polygraph", options.lm_polygraph, lm_polygraph),
            ("uqlm", options.uqlm, uqlm),
        ):
            if not python:
                continue
            print(f"{peer} ...", flush=True)
            try:
                found[peer] = run(options, python, questions, parts, folder)
            except RuntimeError as error:
                print(f"{peer}: {error}", flush=True)
    lines = report(found, len(questions))
    print(json.dumps(lines, indent=1))
    if options.json:
        Path(options.json).write_text(json.dumps(lines, indent=1) + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lm-polygraph", help="Python of an environment that has lm-polygraph")
    parser.add_argument("--uqlm", help="Python of an environment that has uqlm and langchain-openai")
    parser.add_argument("--samples", type=int, default=0, help="more answers to each question, for the scores that need them")
    parser.add_argument("--quick", action="store_true", help="200 questions")
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--base", default="smollm2-135m")
    return parser.parse_args()


def trimtab(options: argparse.Namespace, folder: Path) -> tuple[Measured, dict[int, torch.Tensor], list[Question]]:
    """Ours, with the indices of each seed's test questions, and the questions in the order of these."""
    print("trimtab ...", flush=True)
    out, report_to = folder / "signals", folder / "detect.json"
    common = ["--base", options.base]
    collect = ["collect", "--questions", SOURCE, "--out", str(out), "--max_tokens", str(TOKENS), "--dtype", "fp32"]
    collect += ["--num_samples", str(options.samples), "--limit", "200" if options.quick else "0"]
    collecting = timed([sys.executable, "-m", "trimtab", *collect, *common])
    heads_of = [
        "detect",
        "--signals",
        str(out),
        "--head",
        "flag",
        "mlp",
        "linear",
        "--register",
        "false",
        "--num_seeds",
        str(SEEDS),
    ]
    learning = timed([sys.executable, "-m", "trimtab", *heads_of, "--json", str(report_to), *common])
    data = read_dataset(out)
    rows = split_by_seed(data, SEEDS, 0.1, 0.25)
    known = {question.question: question for question in read_questions(SOURCE)}
    made = json.loads(report_to.read_text())
    auroc = {arm["name"]: [seed["auroc"] for seed in arm["seeds"]] for arm in [made, *made["rivals"]]}
    measured = Measured(collecting, auroc, {"learning": learning})
    return measured, {seed: parts.test_indices for seed, parts in rows.items()}, [known[text] for text in data.questions]


def lm_polygraph(
    options: argparse.Namespace, python: str, questions: Sequence[Question], parts: dict[int, torch.Tensor], folder: Path
) -> Measured:
    model = str(resolve_base_model(options.base).path)
    task = {"model": model, "batch": BATCH, "samples": options.samples}
    return peer(python, "with_lm_polygraph.py", task, questions, parts, folder)


def uqlm(
    options: argparse.Namespace, python: str, questions: Sequence[Question], parts: dict[int, torch.Tensor], folder: Path
) -> Measured:
    began = time.monotonic()
    command = servers.vllm(str(resolve_base_model(options.base).path), "base", "--max-model-len", "2048")
    with servers.running(Server("vllm", command, environment=servers.VLLM_ENVIRONMENT)) as up:
        starting = time.monotonic() - began
        task = {"model": "base", "url": f"{up.url}/v1", "samples": options.samples}
        made = peer(python, "with_uqlm.py", task, questions, parts, folder)
    return Measured(made.seconds + starting, made.auroc, made.extra)


def peer(
    python: str,
    script: str,
    task: dict[str, Any],
    questions: Sequence[Question],
    parts: dict[int, torch.Tensor],
    folder: Path,
) -> Measured:
    """Run a library's script, judge its answers, and rank them by each of its scores."""
    given, made = folder / "task.json", folder / "made.json"
    asked = [question.prompt.messages[-1]["content"] for question in questions]
    given.write_text(json.dumps(task | {"questions": asked, "max_tokens": TOKENS}))
    seconds = timed([python, str(PEERS / script), str(given), str(made)])
    found = json.loads(made.read_text())
    judged = zip(questions, found["answers"], strict=True)
    right = torch.tensor([float(mark_answer(q.kind or "contains", answer, q.answers).right) for q, answer in judged])
    auroc = {
        name: [heads.compute_auroc(torch.tensor(values)[at], right[at]) for at in parts.values()]
        for name, values in found["scores"].items()
    }
    return Measured(seconds, auroc, {"right": right.mean().item()})


def timed(command: Sequence[str]) -> float:
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:3])} failed:\n{done.stderr[-3000:]}")
    return time.monotonic() - began


def report(found: dict[str, Measured], questions: int) -> list[dict[str, Any]]:
    ours = found["trimtab"]
    lines: list[dict[str, Any]] = []
    for library, made in found.items():
        lines.append(
            {"name": f"libraries.{library}.seconds", "value": made.seconds, "unit": f"s for {questions} questions"}
            | {"peer": {"trimtab": ours.seconds}, "ratio": made.seconds / ours.seconds, "goal": None, "met": None}
            | made.extra
        )
        lines += [
            {"name": f"libraries.{library}.{name}", "value": statistics.mean(values), "unit": "AUROC"}
            | {"spread": [min(values), max(values)], "peer": None, "ratio": None, "goal": None, "met": None}
            for name, values in made.auroc.items()
        ]
    return lines


if __name__ == "__main__":
    main()
