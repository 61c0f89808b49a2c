"""Stored signals: how well someone with the model identifies the text of an answer, and finds its words.

python bench/privacy.py [--quick] [--json FILE]

Answers to 1,000 prompts are collected as a server stores them: features and token statistics in half precision, no text. The
attacker has the model and all candidate texts, computes the signals of each with transformers, and takes the closest one.
Each line is the share of answers that are identified, for parts of the signals and with noise added to them. For the words, a
ridge regression on one half of the answers predicts which of the commonest words of the prompts the others contain.
"""

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peers.homes import own_home
from torch import Tensor
from transformers import AutoModelForCausalLM

from trimtab.data.prompt_sets import read_prompt_set
from trimtab.detection.signal_dataset import SignalDataset, read_dataset
from trimtab.detection.signals import compute_token_statistics, concatenate_states
from trimtab.heads import compute_auroc
from trimtab.jobs.collect.config import CollectConfig
from trimtab.jobs.collect.job import collect
from trimtab.model.base_model import BaseModel, resolve_base_model
from trimtab.model.chat_template import build_renderer
from trimtab.stats.intervals import compute_wilson_interval
from trimtab.text.normalization import normalize_answer

CANDIDATES, QUICK_CANDIDATES = 1000, 200
TOKENS = 24
PARTS = ["last state", "mean", "difference"]
# Standard deviations of noise, in those of each feature over the answers.
NOISES = (0.3, 1.0, 3.0, 10.0)
# Words that the probe looks for, and its penalty.
WORDS, PENALTY = 200, 100.0


@dataclass(frozen=True)
class Signals:
    """Signals of N answers.

    Attributes:
        parts: features by part of psi [N, d] each: last state, mean, and their difference from the question.
        history: mean and standard deviation of each token statistic, and the number of tokens [N, 7].
    """

    parts: dict[str, Tensor]
    history: Tensor


def main() -> None:
    options = parse_arguments()
    count = QUICK_CANDIDATES if options.quick else CANDIDATES
    with tempfile.TemporaryDirectory(prefix="privacy-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        own_home(folder / "home")
        base = resolve_base_model(options.base)
        prompts = [prompt.prompt for prompt in read_prompt_set("guard")]
        prompts = list(dict.fromkeys(prompts))[:count]
        rows = [json.dumps({"question": prompt, "answers": ["-"]}) for prompt in prompts]
        (folder / "questions.jsonl").write_text("\n".join(rows))
        layer = base.depth * 2 // 3
        collect(
            CollectConfig(
                questions=str(folder / "questions.jsonl"),
                out=str(folder / "signals"),
                base=options.base,
                layers=[layer],
                max_tokens=TOKENS,
            )
        )
        data = read_dataset(folder / "signals", base)
        stored, attacker = read_stored(data), compute_candidates(base, data, layer)
        lines = [*measure_identification(stored, attacker), *measure_words(stored, data)]
    print(json.dumps(lines, indent=1))
    if options.json:
        Path(options.json).write_text(json.dumps(lines, indent=1) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_CANDIDATES} candidates instead of {CANDIDATES}")
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--base", default="smollm2-135m")
    return parser.parse_args()


def read_stored(data: SignalDataset) -> Signals:
    """Return the signals as a server stores them, in half precision."""
    psi = data.psi[:, 0].half().float()
    return build_signals(psi, [trace.half().float() for trace in data.traces])


@torch.no_grad()
def compute_candidates(base: BaseModel, data: SignalDataset, layer: int) -> Signals:
    """Compute the signals of each candidate text with transformers, in single precision."""
    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32).eval()
    renderer = build_renderer(base, 1)
    psi: list[Tensor] = []
    traces: list[Tensor] = []
    for question, answer, finished in zip(data.questions, data.answers, data.finished, strict=True):
        prompt = renderer.render_prompt([{"role": "user", "content": question}])
        tokens = renderer.render_answer(answer, prompt)
        ids = torch.tensor([[*prompt, *(tokens if finished else tokens[:-1])]])
        output = model(ids, output_hidden_states=True)
        states, start = output.hidden_states[layer][0], len(prompt) - 1
        part, question_mean = states[start:-1], states[: len(prompt)].mean(0)
        psi.append(concatenate_states(part[-1], part.mean(0), question_mean))
        statistics = compute_token_statistics(output.logits[0, start:-1], ids[0, len(prompt) :])
        traces.append(torch.stack([statistics.logp, statistics.entropy, statistics.margin], 1))
    return build_signals(torch.stack(psi), traces)


def build_signals(psi: Tensor, traces: Sequence[Tensor]) -> Signals:
    """Build the signals of N answers from their features [N, 3d] and token statistics."""
    parts: dict[str, Tensor] = dict(zip(PARTS, psi.chunk(3, 1), strict=True))
    history = [torch.cat([trace.mean(0), trace.std(0, unbiased=False), torch.tensor([float(len(trace))])]) for trace in traces]
    return Signals(parts, torch.stack(history))


def measure_identification(stored: Signals, attacker: Signals) -> list[dict[str, Any]]:
    """Measure the share of answers whose candidate is the closest one."""
    whole = torch.cat(list(stored.parts.values()), 1)
    candidates = torch.cat(list(attacker.parts.values()), 1)
    lines = [build_line("features and token statistics", join(whole, stored.history), join(candidates, attacker.history))]
    lines.append(build_line("features, without token statistics", whole, candidates))
    lines += [build_line(f"{name} alone", part, attacker.parts[name]) for name, part in stored.parts.items()]
    lines.append(build_line("token statistics alone", stored.history, attacker.history))
    generator = torch.Generator().manual_seed(0)
    for noise in NOISES:
        noisy = whole + noise * whole.std(0) * torch.randn(whole.shape, generator=generator)
        lines.append(build_line(f"features with noise of {noise:g} standard deviations", noisy, candidates))
    return lines


def join(features: Tensor, history: Tensor) -> Tensor:
    """Join features and token statistics, each with unit variance."""
    return torch.cat([features / features.std(0), history / history.std(0)], 1)


def build_line(name: str, stored: Tensor, candidates: Tensor) -> dict[str, Any]:
    """Build the line of one attack: the share of rows [N, k] whose candidate is the closest of all."""
    scale = candidates.std(0).clamp(min=1e-6)
    closest = torch.cdist(stored / scale, candidates / scale).argmin(1)
    rate = compute_wilson_interval(int((closest == torch.arange(len(stored))).sum()), len(stored))
    print(f"{name}: identified {rate} of {len(candidates)} candidates", flush=True)
    return {
        "name": f"identified by {name}",
        "value": rate.value,
        "unit": "share",
        "peer": 1 / len(candidates),
        "ratio": None,
        "low": rate.low,
        "high": rate.high,
        "goal": None,
        "met": None,
    }


def measure_words(stored: Signals, data: SignalDataset) -> list[dict[str, Any]]:
    """Measure the mean AUROC with which a probe finds the words of the prompts."""
    words = [set(normalize_answer(question).split()) for question in data.questions]
    common = [word for word, _ in Counter(word for entry in words for word in entry).most_common(WORDS)]
    labels = torch.tensor([[word in entry for word in common] for entry in words])
    half = len(labels) // 2
    lines: list[dict[str, Any]] = []
    inputs = {"features": torch.cat(list(stored.parts.values()), 1), "token statistics": stored.history}
    for name, features in inputs.items():
        scores = predict_words(features[:half], labels[:half], features[half:])
        values = [measure_auroc(scores[:, index], labels[half:, index]) for index in range(len(common))]
        used = torch.tensor([value for value in values if value is not None])
        print(f"words from {name}: AUROC {used.mean():.3f} over {len(used)} words", flush=True)
        line = {"name": f"words from {name}", "value": used.mean().item(), "unit": "AUROC", "peer": 0.5, "ratio": None}
        low, high = torch.quantile(used, torch.tensor([0.1, 0.9])).tolist()
        lines.append(line | {"low": low, "high": high, "goal": None, "met": None})
    return lines


def predict_words(train: Tensor, labels: Tensor, test: Tensor) -> Tensor:
    """Predict scores [n, words] of test rows by ridge regression."""
    center, scale = train.mean(0), train.std(0).clamp(min=1e-6)
    x, z = ((rows - center) / scale for rows in (train, test))
    targets = labels.float() - labels.float().mean(0)
    kernel = x @ x.T + PENALTY * torch.eye(len(x))
    return z @ (x.T @ torch.linalg.solve(kernel, targets))


def measure_auroc(scores: Tensor, labels: Tensor) -> float | None:
    """Measure the AUROC of scores [n]; None if one class has fewer than five rows."""
    count = int(labels.sum())
    return compute_auroc(scores, labels) if min(count, len(labels) - count) >= 5 else None


if __name__ == "__main__":
    main()
