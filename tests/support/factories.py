"""Factories of prompts, prefixes, detectors, signal data sets and packages, and reference outputs of transformers."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from trimtab import heads
from trimtab.artifacts.card import PrefixCard
from trimtab.artifacts.prefix import Prefix, build_prefix, save_prefix
from trimtab.data.prompt import Prompt
from trimtab.detection.calibration import FALSE_POSITIVE_RATES
from trimtab.detection.detector import Detector, build_detector
from trimtab.detection.detector_card import DetectorCard
from trimtab.detection.label_heads import combine_heads
from trimtab.detection.signal_files import DatasetMetadata, append_part, begin_dataset
from trimtab.detection.signals import compute_token_statistics, concatenate_states
from trimtab.evaluation.detection.metrics import Metric
from trimtab.generation_types import Conversation, Signals
from trimtab.model.base_model import BaseModel
from trimtab.model.chat_template import ChatRenderer, build_renderer
from trimtab.model.frozen_model import FrozenModel
from trimtab.types import Label, Position


def make_prompt(text: str, label: Label = "harmful", **fields) -> Prompt:
    """Make a prompt that is its own group by default."""
    return Prompt(text, label, "test", fields.pop("group", text), **fields)


QUESTIONS = (
    "What is the capital of France?",
    "Name three fruits.",
    "How do I boil an egg?",
    "Who wrote Hamlet?",
    "Write a short poem about the sea.",
    "What is two plus two?",
)


def make_prefix(frozen: FrozenModel, base: BaseModel, name: str, rows: int, position: Position, seed: int) -> Prefix:
    """Make a random prefix that changes answers: scaled token embeddings with noise."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = frozen.embedding.weight.detach().float()
    selected = embeddings[torch.randint(len(embeddings), (rows,), generator=generator)] * 4
    vectors = selected + 0.05 * torch.randn(rows, embeddings.shape[1], generator=generator)
    return build_prefix(vectors, PrefixCard("prefix", name, base.name, base.fingerprint, position, 0, 0, ""))


def generate_reference(frozen: FrozenModel, base: BaseModel, conversation: Conversation, tokens: int) -> list[int]:
    """Generate token ids with transformers, greedily and from `inputs_embeds`. The engine must give the same ids."""
    renderer = build_renderer(base, 8)
    prefix = conversation.prefix
    rows = range(renderer.first_slot, renderer.first_slot + len(prefix.vectors)) if prefix else ()
    position = prefix.card.position if prefix else "system"
    ids = torch.tensor(renderer.render_prompt(conversation.messages, position, rows))
    is_row = ids >= renderer.first_slot
    embeddings = frozen.embedding(ids.masked_fill(is_row, 0)).clone()
    if prefix:
        embeddings[is_row] = prefix.vectors
    output = frozen.model.generate(  # pyright: ignore[reportCallIssue]
        inputs_embeds=embeddings[None],
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=tokens,
        do_sample=False,
    )
    return output[0].tolist()


def compute_reference_signals(
    frozen: FrozenModel, renderer: ChatRenderer, conversation: Conversation, token_ids: Sequence[int], layers: Sequence[int]
) -> Signals:
    """Compute signals in one forward pass of transformers over prompt and answer. The engine must capture the same signals."""
    prefix = conversation.prefix
    rows = range(renderer.first_slot, renderer.first_slot + len(prefix.vectors)) if prefix else ()
    prompt = renderer.render_prompt(conversation.messages, prefix.card.position if prefix else "system", rows)
    ids = torch.tensor([[*prompt, *token_ids]])
    with torch.no_grad():
        embeddings = frozen.embed_inputs(prefix.vectors if prefix else None, ids)
        output = frozen.model(inputs_embeds=embeddings, output_hidden_states=True)
    states = torch.stack([output.hidden_states[layer][0] for layer in layers], 1)
    answer_states = states[len(prompt) - 1 : -1]
    statistics = compute_token_statistics(output.logits[0, len(prompt) - 1 : -1], ids[0, len(prompt) :])
    psi = concatenate_states(answer_states[-1], answer_states.mean(0), states[: len(prompt)].mean(0))
    return Signals(psi, torch.stack([statistics.logp, statistics.entropy, statistics.margin], 1))


def compute_prompt_states(
    frozen: FrozenModel, renderer: ChatRenderer, conversation: Conversation, layers: Sequence[int]
) -> torch.Tensor:
    """Compute the states [m, L, d] of the m tokens of a prompt in one forward pass of transformers."""
    prefix = conversation.prefix
    rows = range(renderer.first_slot, renderer.first_slot + len(prefix.vectors)) if prefix else ()
    ids = torch.tensor([renderer.render_prompt(conversation.messages, prefix.card.position if prefix else "system", rows)])
    with torch.no_grad():
        embeddings = frozen.embed_inputs(prefix.vectors if prefix else None, ids)
        hidden = frozen.model(inputs_embeds=embeddings, output_hidden_states=True).hidden_states
    return torch.stack([hidden[layer][0] for layer in layers], 1)


def make_detector(frozen: FrozenModel, base: BaseModel, name: str, layers: tuple[int, ...]) -> Detector:
    """Make a detector with a random head, calibrated so that answers to `QUESTIONS` have risks around 0.5."""
    torch.manual_seed(0)
    settings = {"groups": 4, "projection": 16, "hidden": 32}
    head = heads.get_head("flag")(base.width, len(layers), **settings)
    renderer = build_renderer(base, 8)
    conversations = [Conversation([{"role": "user", "content": question}]) for question in QUESTIONS]
    signals = [
        compute_reference_signals(frozen, renderer, conversation, generate_reference(frozen, base, conversation, 10), layers)
        for conversation in conversations
    ]
    normalizer = torch.stack([torch.zeros(7), torch.ones(7)])
    card = DetectorCard(name, base.name, base.fingerprint, list(layers), base.width, "flag", settings, -2.0, {})
    # With this small slope no risk rounds to 0 or 1, whose logit is infinite.
    flat = build_detector(head, normalizer, torch.tensor([1e-3, 0.0]), card)
    scores = -1e3 * torch.tensor([flat.score_answer(entry, layers) for entry in signals]).logit()
    calibration = torch.stack([1 / scores.std(), -scores.mean() / scores.std()])
    calibrated = build_detector(head, normalizer, calibration, card)
    risks = torch.tensor([calibrated.score_answer(entry, layers) for entry in signals])
    thresholds = dict.fromkeys(FALSE_POSITIVE_RATES, float(risks.median()) + 1e-3)
    card = replace(card, thresholds=thresholds, reference_risks=[step / 100 for step in range(101)])
    return build_detector(head, normalizer, calibration, card)


def compute_prompt_psi(frozen: FrozenModel, base: BaseModel, conversation: Conversation, layers: Sequence[int]) -> torch.Tensor:
    """Compute psi [L, 3d] of a prompt in one forward pass of transformers."""
    states = compute_prompt_states(frozen, build_renderer(base, 8), conversation, layers)
    return torch.cat([states[-1], states.mean(0), states[-1] - states.mean(0)], -1)


def make_prompt_detector(
    frozen: FrozenModel,
    base: BaseModel,
    name: str,
    layers: tuple[int, ...],
    questions: Sequence[str] = QUESTIONS,
    seed: int = 1,
) -> Detector:
    """Make a detector of prompts with a random linear head, whose balanced threshold flags half of the questions."""
    torch.manual_seed(seed)
    head = heads.get_head("linear")(base.width, len(layers), parts=2)
    conversations = [Conversation([{"role": "user", "content": question}]) for question in questions]
    psi = torch.stack([compute_prompt_psi(frozen, base, conversation, layers) for conversation in conversations])
    with torch.no_grad():
        scores = head(psi, torch.zeros(len(psi), 7))
    calibration = torch.stack([1 / scores.std(), -scores.mean() / scores.std()])
    normalizer = torch.stack([torch.zeros(7), torch.ones(7)])
    options = {"parts": 2}
    card = DetectorCard(
        name, base.name, base.fingerprint, list(layers), base.width, "linear", options, -2.0, {}, subject="prompt"
    )
    risks = build_detector(head, normalizer, calibration, card).score_prompts(psi).sort().values
    middle = float(risks[len(risks) // 2 - 1 : len(risks) // 2 + 1].mean())
    thresholds = {"0.05": float(risks[-1]) + 1e-3, "balanced": middle}
    return build_detector(head, normalizer, calibration, replace(card, thresholds=thresholds))


def make_label_detector(
    frozen: FrozenModel, base: BaseModel, name: str, layers: tuple[int, ...], labels: Sequence[str]
) -> Detector:
    """Make a detector of prompts with a random linear head per label; each flags half of `QUESTIONS`."""
    made = [make_prompt_detector(frozen, base, name, layers, seed=seed) for seed in range(2, 2 + len(labels))]
    head = combine_heads(dict(zip(labels, (d.head for d in made), strict=True)), [d.calibration for d in made])
    thresholds = {label: d.card.thresholds for label, d in zip(labels, made, strict=True)}
    card = replace(made[0].card, label_thresholds=thresholds)
    return build_detector(head, made[0].normalizer, torch.tensor([1.0, 0.0]), card)


def make_random_detector(base: BaseModel, name: str, layers: tuple[int, ...]) -> Detector:
    """Make a detector with a random head, without calibration."""
    torch.manual_seed(0)
    settings = {"groups": 4, "projection": 16, "hidden": 32}
    thresholds = dict.fromkeys(FALSE_POSITIVE_RATES, 0.5)
    card = DetectorCard(name, base.name, base.fingerprint, list(layers), base.width, "flag", settings, -2.0, thresholds)
    head = heads.get_head("flag")(base.width, len(layers), **settings)
    return build_detector(head, torch.stack([torch.zeros(7), torch.ones(7)]), torch.tensor([1.0, 0.0]), card)


# Number of tokens of each answer that tests compare.
TOKENS = 10


def build_mixed_conversations(prefixes: list[Prefix]) -> list[Conversation]:
    """Build conversations of each question without a prefix and with each prefix, in this order."""
    messages = [[{"role": "user", "content": question}] for question in QUESTIONS]
    return [Conversation(message, prefix) for message in messages for prefix in (None, *prefixes)]


def install_package(folder: Path, name: str, source: str, group: str) -> None:
    """Write a package as pip installs it: a module `trimtab_NAME`, and metadata with its entry point in a group."""
    (folder / f"trimtab_{name}.py").write_text(source)
    metadata = folder / f"trimtab_{name}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: trimtab-{name}\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[{group}]\n{name} = trimtab_{name}\n")


def build_signal_row(number: int, question: str, truthful: bool | None, psi: torch.Tensor, history: torch.Tensor) -> dict:
    """Build a row of a signal data set, for an answer of four tokens."""
    return {
        "key": f"{number:05d}",
        "question": question,
        "source": "made",
        "group": question.lower(),
        "answer": "So.",
        "truthful": truthful,
        "why": "made",
        "tokens": 4,
        "whole": True,
        "psi": psi.flatten().tolist(),
        "history": history.flatten().tolist(),
    }


def write_signal_dataset(
    folder: Path, base: BaseModel, layers: tuple[int, int], seed: int = 0, *, unfinished: bool = False
) -> Path:
    """Write signals of 400 answers whose labels show in the last state of the last layer; every tenth has no label.

    With `unfinished`, the answers have signals at their fourth token, which is the last one.
    """
    settings = json.dumps({"unfinished": True}) if unfinished else ""
    metadata = DatasetMetadata(base.name, base.fingerprint, layers, base.width, "fp32", None, settings)
    begin_dataset(folder, metadata)
    generator = torch.Generator().manual_seed(seed)
    for part in range(4):
        rows = [_build_random_row(part * 100 + i, base.width, generator, seed) for i in range(100)]
        if unfinished:
            rows = [row | {"unfinished": np.array(row["psi"], dtype=np.float16)} for row in rows]
        append_part(folder, metadata, rows)
    return folder


def write_prompt_dataset(folder: Path, base: BaseModel, layers: tuple[int, int], seed: int, *, windows: bool = False) -> Path:
    """Write signals of 400 prompts whose labels show in the mean state of the last layer only.

    With `windows`, half of the prompts look benign as a whole, and their labels show in the second of two windows only.
    """
    metadata = DatasetMetadata(base.name, base.fingerprint, layers, base.width, "fp32", None, "", subject="prompt")
    begin_dataset(folder, metadata)
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number in range(400):
        benign = number % 2 == 0
        end, mean = torch.randn(2, 2, base.width, generator=generator)
        is_long = windows and number % 4 < 2
        plain = mean.clone()
        mean[1, :100] += 0.6 * benign
        window = torch.stack([plain + 0.6, mean]) if is_long else None
        if is_long:
            mean = plain + 0.6
        psi = torch.cat([end, mean, end - mean], -1)
        row = build_signal_row(number, f"Prompt {number} of {seed}?", benign, psi, torch.empty(0))
        # The first ten keys are those of all seeds.
        key = row["key"] if number < 10 else f"{seed}-{row['key']}"
        rows.append(row | {"answer": "", "key": key, "windows": None if window is None else window.flatten().numpy()})
    append_part(folder, metadata, rows)
    return folder


def write_label_dataset(folder: Path, base: BaseModel, layers: tuple[int, int]) -> Path:
    """Write signals of 600 prompts, a third of which have the label `cars` or `food`, or both; each shows in its own states."""
    metadata = DatasetMetadata(base.name, base.fingerprint, layers, base.width, "fp32", None, "", subject="prompt")
    begin_dataset(folder, metadata)
    generator = torch.Generator().manual_seed(0)
    rows = []
    for number in range(600):
        labels = [label for label, is_in in (("cars", number % 3 == 0), ("food", number % 4 == 0)) if is_in]
        psi = torch.randn(2, 3 * base.width, generator=generator)
        psi[1, :50] += 1.5 * ("cars" in labels)
        psi[1, 50:100] += 1.5 * ("food" in labels)
        row = build_signal_row(number, f"Prompt {number}?", not labels, psi, torch.empty(0))
        rows.append(row | {"answer": "", "labels": labels})
    append_part(folder, metadata, rows)
    return folder


def _build_random_row(number: int, width: int, generator: torch.Generator, seed: int) -> dict:
    truthful = bool(torch.rand(1, generator=generator) < 0.6)
    psi = torch.randn(2, 3 * width, generator=generator)
    psi[1, :100] += truthful
    history = torch.randn(4, 3, generator=generator).abs() * torch.tensor([-1.0, 1.0, 1.0])
    question = f"Question {number}{f' of {seed}' if seed else ''}?"
    return build_signal_row(number, question, None if number % 10 == 0 else truthful, psi, history)


def compute_metric(metric: Metric, risk: np.ndarray, made_up: np.ndarray) -> float:
    """Compute a metric with each answer counted once."""
    return float(metric(risk, made_up, np.ones((1, len(risk)), dtype=int))[0])


def save_random_prefix(base: BaseModel, name: str, seed: int, folder: Path) -> Path:
    """Save a prefix with random vectors and return its folder."""
    vectors = torch.randn(1, base.width, generator=torch.Generator().manual_seed(seed))
    card = PrefixCard("prefix", name, base.name, base.fingerprint, "system", 0, 0, "", metrics={"test_balanced": 0.7})
    return save_prefix(build_prefix(vectors, card), folder / f"{name}{seed}")
