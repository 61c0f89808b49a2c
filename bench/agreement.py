"""Agreement of the signals and risks of the engine with those of one transformers pass over the same tokens.

python bench/agreement.py [--quick] [--json FILE]

All requests run at the same time. Their prompts have different lengths and are prefilled in chunks. Then all requests run once
more, from the prefix cache. The risks come from a detector that is trained on these answers.
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

LAYERS = (20, 29)
QUICK_REQUESTS = 80
ANSWER_TOKENS, QUICK_ANSWER_TOKENS = 48, 16
PROMPT_LENGTHS = 32
# Largest accepted differences: relative error of signals, absolute difference of risks.
MAX_SIGNAL_ERROR, MAX_RISK_DIFFERENCE = 1e-3, 0.01


def main() -> None:
    options = parse_arguments()
    requests, tokens = (QUICK_REQUESTS, QUICK_ANSWER_TOKENS) if options.quick else (options.requests, ANSWER_TOKENS)
    lines = build_report(measure_differences(options.base, requests, tokens))
    print(json.dumps(lines, indent=1))
    if options.json:
        Path(options.json).write_text(json.dumps(lines, indent=1) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="80 requests, shorter answers")
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--requests", type=int, default=100)
    return parser.parse_args()


def measure_differences(base: str, requests: int, tokens: int) -> dict[str, float]:
    """Measure the largest differences over concurrent requests, without and with the prefix cache.

    Args:
        base: name of the base model.
        requests: number of requests.
        tokens: largest number of tokens of an answer.

    Returns:
        Largest differences of psi, history and risk, number of compared requests, and longest and shortest prompt in tokens.
    """
    questions = read_questions("trimtab:countries")[:requests]
    # Prompts differ by up to 160 tokens. Together they exceed the tokens of a step, so that they are prefilled in chunks.
    texts = [
        f"{'Think before you answer. ' * (index % PROMPT_LENGTHS)}{question.question}"
        for index, question in enumerate(questions)
    ]
    conversations = [Conversation([{"role": "user", "content": text}]) for text in texts]
    config = EngineConfig(
        num_slots=8, dtype="fp32", layers=LAYERS, token_statistics=True, max_num_seqs=requests, max_num_batched_tokens=512
    )
    with Engine(base, config) as engine:
        cold, cached = (
            [answers[0] for answers in engine.chat_many(conversations, Sampling(max_tokens=tokens))] for _ in range(2)
        )
        prompts = [engine.renderer.render_prompt(conversation.messages) for conversation in conversations]
    model = resolve_base_model(base).load("fp32")
    references = [compute_reference(model, prompt, answer) for prompt, answer in zip(prompts, cold, strict=True)]
    labels = [
        float(mark_answer("contains", answer.text, question.answers).right)
        for answer, question in zip(cold, questions, strict=True)
    ]
    splits = split_data(*stack_signals(references), torch.tensor(labels), texts, 0, 0.25, 0.25)
    detector = train_detector(Candidate("flag", tuple(range(len(LAYERS))), {"groups": 4}), splits, 0)
    largest = {"psi": 0.0, "history": 0.0, "risk": 0.0}
    for answers in (cold, cached):
        # Greedy answers can differ where two tokens have equal scores. The reference pass has the tokens of the cold answers.
        pairs = [
            (answer.signals, reference)
            for answer, cold_answer, reference in zip(answers, cold, references, strict=True)
            if answer.signals is not None and answer.token_ids == cold_answer.token_ids
        ]
        engine_risks = predict_risks(detector, splits, [signals for signals, _ in pairs])
        reference_risks = predict_risks(detector, splits, [reference for _, reference in pairs])
        psi_errors = (compute_relative_error(signals.psi, reference.psi) for signals, reference in pairs)
        history_errors = (compute_relative_error(signals.history, reference.history) for signals, reference in pairs)
        largest["psi"] = max(largest["psi"], *psi_errors)
        largest["history"] = max(largest["history"], *history_errors)
        largest["risk"] = max(largest["risk"], float((engine_risks - reference_risks).abs().max()))
        largest["requests"] = min(largest.get("requests", len(conversations)), len(pairs))
    return largest | {"longest": max(map(len, prompts)), "shortest": min(map(len, prompts))}


@torch.no_grad()
def compute_reference(model: Any, prompt: list[int], answer: Answer) -> Signals:
    """Compute the signals of an answer in one transformers pass."""
    outputs = model(torch.tensor([[*prompt, *answer.token_ids]]), output_hidden_states=True)
    states = torch.stack([outputs.hidden_states[layer][0] for layer in LAYERS], 1)
    answer_states = states[len(prompt) - 1 : -1]
    statistics = compute_token_statistics(outputs.logits[0, len(prompt) - 1 : -1], torch.tensor(answer.token_ids))
    psi = concatenate_states(answer_states[-1], answer_states.mean(0), states[: len(prompt)].mean(0))
    return Signals(psi, torch.stack([statistics.logp, statistics.entropy, statistics.margin], 1))


def stack_signals(signals: Sequence[Signals]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return psi of all answers as one tensor, and the history of each answer."""
    return torch.stack([item.psi for item in signals]).float(), [item.history for item in signals]


def predict_risks(detector: TrainedDetector, splits: DataSplits, signals: Sequence[Signals]) -> torch.Tensor:
    """Predict the risk of each answer."""
    psi, histories = stack_signals(signals)
    rows = build_foreign_rows(psi, histories, torch.zeros(len(signals)), splits)
    scores = heads.predict_scores(detector.head, select_features(rows, detector.candidate))
    return compute_risk(scores, detector.calibration)


def compute_relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    """Compute the norm of the difference, relative to the norm of the expected value."""
    return float((value - expected).norm() / expected.norm())


def build_report(largest: dict[str, float]) -> list[dict[str, Any]]:
    """Build the lines of the report from the largest differences."""
    goals = {"psi": MAX_SIGNAL_ERROR, "history": MAX_SIGNAL_ERROR, "risk": MAX_RISK_DIFFERENCE}
    units = {"psi": "largest relative error", "history": "largest relative error", "risk": "largest difference"}
    return [
        {"name": f"agreement.{key}", "value": largest[key], "unit": units[key], "peer": "one transformers pass", "ratio": None}
        | {"goal": goal, "met": largest[key] <= goal, "requests": largest["requests"]}
        for key, goal in goals.items()
    ]


if __name__ == "__main__":
    main()
