"""Signals and risks of the engine beside those of one transformers pass over the same tokens: how far apart they are.

python bench/agreement.py [--quick] [--json FILE]

All requests are in flight at once, of mixed length, their prompts in pieces of a step; then all once more, from the prefix
cache. The risks are those of a detector that is fitted to these answers for the purpose.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from trimtab import heads
from trimtab.data.questions import read_questions
from trimtab.detection.calibration import compute_risk
from trimtab.detection.signals import compute_token_statistics, concatenate_states
from trimtab.detection.training import (
    Candidate,
    DataSplits,
    TrainedDetector,
    build_foreign_rows,
    select_features,
    split_data,
    train_detector,
)
from trimtab.engine.config import EngineConfig
from trimtab.engine.offline import Engine
from trimtab.generation_types import Answer, Conversation, Sampling, Signals
from trimtab.judges.answer_matching import mark_answer
from trimtab.model.base_model import resolve_base_model

LAYERS, TOKENS = (20, 29), 48
# How far signals (relative) and risks may be from one pass.
NEAR, SAME_RISK = 1e-3, 0.01


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="80 requests, shorter answers")
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--requests", type=int, default=100)
    options = parser.parse_args()
    lines = report(compared(options.base, 80 if options.quick else options.requests, 16 if options.quick else TOKENS))
    print(json.dumps(lines, indent=1))
    if options.json:
        Path(options.json).write_text(json.dumps(lines, indent=1) + "\n")


def compared(base: str, requests: int, tokens: int) -> dict[str, float]:
    """The largest differences over requests that are all in flight, cold and then from the prefix cache."""
    questions = read_questions("trimtab:countries")[:requests]
    # Of mixed length: by up to 160 tokens, and in pieces of a step.
    texts = [f"{'Think before you answer. ' * (at % 32)}{q.question}" for at, q in enumerate(questions)]
    given = [Conversation([{"role": "user", "content": text}]) for text in texts]
    config = EngineConfig(
        num_slots=8, dtype="fp32", layers=LAYERS, token_statistics=True, max_num_seqs=requests, max_num_batched_tokens=512
    )
    with Engine(base, config) as started:
        cold, cached = ([several[0] for several in started.chat_many(given, Sampling(max_tokens=tokens))] for _ in range(2))
        prompts = [started.renderer.render_prompt(ask.messages) for ask in given]
    model = resolve_base_model(base).load("fp32")
    truth = [one_pass(model, prompt, answer) for prompt, answer in zip(prompts, cold, strict=True)]
    right = [float(mark_answer("contains", a.text, q.answers).right) for a, q in zip(cold, questions, strict=True)]
    rows = split_data(*tensors(truth), torch.tensor(right), texts, 0, 0.25, 0.25)
    learned = train_detector(Candidate("flag", tuple(range(len(LAYERS))), {"groups": 4}), rows, 0)
    worst = {"psi": 0.0, "history": 0.0, "risk": 0.0}
    for made in (cold, cached):
        # Greedy answers may part where two tokens are as good; one pass is over the tokens of the first.
        pairs = [
            (one.signals, passed)
            for one, first, passed in zip(made, cold, truth, strict=True)
            if one.signals is not None and one.token_ids == first.token_ids
        ]
        mine, theirs = risks(learned, rows, [a for a, _ in pairs]), risks(learned, rows, [b for _, b in pairs])
        worst["psi"] = max(worst["psi"], *(relative(a.psi, b.psi) for a, b in pairs))
        worst["history"] = max(worst["history"], *(relative(a.history, b.history) for a, b in pairs))
        worst["risk"] = max(worst["risk"], float((mine - theirs).abs().max()))
        worst["requests"] = min(worst.get("requests", len(given)), len(pairs))
    return worst | {"longest": max(map(len, prompts)), "shortest": min(map(len, prompts))}


@torch.no_grad()
def one_pass(model: Any, prompt: list[int], answer: Answer) -> Signals:
    seen = model(torch.tensor([[*prompt, *answer.token_ids]]), output_hidden_states=True)
    states = torch.stack([seen.hidden_states[layer][0] for layer in LAYERS], 1)
    own = states[len(prompt) - 1 : -1]
    read = compute_token_statistics(seen.logits[0, len(prompt) - 1 : -1], torch.tensor(answer.token_ids))
    psi = concatenate_states(own[-1], own.mean(0), states[: len(prompt)].mean(0))
    return Signals(psi, torch.stack([read.logp, read.entropy, read.margin], 1))


def tensors(made: Sequence[Signals]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    return torch.stack([one.psi for one in made]).float(), [one.history for one in made]


def risks(learned: TrainedDetector, rows: DataSplits, made: Sequence[Signals]) -> torch.Tensor:
    psi, traces = tensors(made)
    read = build_foreign_rows(psi, traces, torch.zeros(len(made)), rows)
    return compute_risk(heads.predict_scores(learned.head, select_features(read, learned.candidate)), learned.calibration)


def relative(made: torch.Tensor, expected: torch.Tensor) -> float:
    return float((made - expected).norm() / expected.norm())


def report(worst: dict[str, float]) -> list[dict[str, Any]]:
    goals = {"psi": NEAR, "history": NEAR, "risk": SAME_RISK}
    units = {"psi": "largest relative error", "history": "largest relative error", "risk": "largest difference"}
    return [
        {"name": f"agreement.{key}", "value": worst[key], "unit": units[key], "peer": "one transformers pass", "ratio": None}
        | {"goal": goal, "met": worst[key] <= goal, "requests": worst["requests"]}
        for key, goal in goals.items()
    ]


if __name__ == "__main__":
    main()
