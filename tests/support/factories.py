"""Things that several tests make."""

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
from trimtab.detection.detector import Detector, DetectorCard, build_detector
from trimtab.detection.signals import compute_token_statistics, concatenate_states
from trimtab.evaluation.detection.metrics import Metric
from trimtab.generation_types import Conversation, Signals
from trimtab.jobs.collect.signal_dataset import DatasetMetadata, append_part, begin_dataset
from trimtab.model.base_model import BaseModel
from trimtab.model.chat_template import ChatRenderer, build_renderer
from trimtab.model.frozen_model import FrozenModel
from trimtab.types import Label, Position


def prompt(text: str, label: Label = "harmful", **more):
    return Prompt(text, label, "test", more.pop("group", text), **more)


QUESTIONS = (
    "What is the capital of France?",
    "Name three fruits.",
    "How do I boil an egg?",
    "Who wrote Hamlet?",
    "Write a short poem about the sea.",
    "What is two plus two?",
)


def make_prefix(frozen: FrozenModel, base: BaseModel, name: str, rows: int, position: Position, seed: int) -> Prefix:
    """A random prefix that changes answers: scaled rows of the vocabulary with noise."""
    generator = torch.Generator().manual_seed(seed)
    table = frozen.embedding.weight.detach().float()
    picked = table[torch.randint(len(table), (rows,), generator=generator)] * 4
    vectors = picked + 0.05 * torch.randn(rows, table.shape[1], generator=generator)
    return build_prefix(vectors, PrefixCard("prefix", name, base.name, base.fingerprint, position, 0, 0, ""))


def reference(frozen: FrozenModel, base: BaseModel, ask: Conversation, tokens: int) -> list[int]:
    """Greedy token ids of transformers with `inputs_embeds`: what the engine must equal."""
    renderer = build_renderer(base, 8)
    rows = range(renderer.first_slot, renderer.first_slot + len(ask.prefix.vectors)) if ask.prefix else ()
    position = ask.prefix.card.position if ask.prefix else "system"
    ids = torch.tensor(renderer.render_prompt(ask.messages, position, rows))
    is_row = ids >= renderer.first_slot
    embedded = frozen.embedding(ids.masked_fill(is_row, 0)).clone()
    if ask.prefix:
        embedded[is_row] = ask.prefix.vectors
    out = frozen.model.generate(  # pyright: ignore[reportCallIssue]
        inputs_embeds=embedded[None],
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=tokens,
        do_sample=False,
    )
    return out[0].tolist()


def one_pass(
    frozen: FrozenModel, renderer: ChatRenderer, ask: Conversation, token_ids: Sequence[int], layers: Sequence[int]
) -> Signals:
    """What one pass of transformers over prompt and answer shows: what the engine must show."""
    rows = range(renderer.first_slot, renderer.first_slot + len(ask.prefix.vectors)) if ask.prefix else ()
    prompt = renderer.render_prompt(ask.messages, ask.prefix.card.position if ask.prefix else "system", rows)
    ids = torch.tensor([[*prompt, *token_ids]])
    with torch.no_grad():
        embedded = frozen.embed_inputs(ask.prefix.vectors if ask.prefix else None, ids)
        seen = frozen.model(inputs_embeds=embedded, output_hidden_states=True)
    states = torch.stack([seen.hidden_states[layer][0] for layer in layers], 1)
    written = states[len(prompt) - 1 : -1]
    read = compute_token_statistics(seen.logits[0, len(prompt) - 1 : -1], ids[0, len(prompt) :])
    psi = concatenate_states(written[-1], written.mean(0), states[: len(prompt)].mean(0))
    return Signals(psi, torch.stack([read.logp, read.entropy, read.margin], 1))


def make_detector(frozen: FrozenModel, base: BaseModel, name: str, layers: tuple[int, ...]) -> Detector:
    """A random head, calibrated so that the questions' answers have risks around a half."""
    torch.manual_seed(0)
    settings = {"groups": 4, "projection": 16, "hidden": 32}
    head = heads.get_head("flag")(base.width, len(layers), **settings)
    renderer = build_renderer(base, 8)
    asks = [Conversation([{"role": "user", "content": question}]) for question in QUESTIONS]
    seen = [one_pass(frozen, renderer, ask, reference(frozen, base, ask, 10), layers) for ask in asks]
    normaliser = torch.stack([torch.zeros(7), torch.ones(7)])
    card = DetectorCard(name, base.name, base.fingerprint, list(layers), base.width, "flag", settings, -2.0, {})
    # So flat that no risk is 0 or 1.
    raw = build_detector(head, normaliser, torch.tensor([1e-3, 0.0]), card)
    score = -1e3 * torch.tensor([raw.score_answer(each, layers) for each in seen]).logit()
    calibration = torch.stack([1 / score.std(), -score.mean() / score.std()])
    middle = build_detector(head, normaliser, calibration, card)
    risks = torch.tensor([middle.score_answer(each, layers) for each in seen])
    thresholds = dict.fromkeys(FALSE_POSITIVE_RATES, float(risks.median()) + 1e-3)
    return build_detector(head, normaliser, calibration, replace(card, thresholds=thresholds))


def random_detector(base: BaseModel, name: str, layers: tuple[int, ...]) -> Detector:
    """A head that nothing was learned for."""
    torch.manual_seed(0)
    settings = {"groups": 4, "projection": 16, "hidden": 32}
    thresholds = dict.fromkeys(FALSE_POSITIVE_RATES, 0.5)
    card = DetectorCard(name, base.name, base.fingerprint, list(layers), base.width, "flag", settings, -2.0, thresholds)
    head = heads.get_head("flag")(base.width, len(layers), **settings)
    return build_detector(head, torch.stack([torch.zeros(7), torch.ones(7)]), torch.tensor([1.0, 0.0]), card)


# Tokens of each answer that are compared.
TOKENS = 10


def mixed_asks(prefixes_used: list[Prefix]) -> list[Conversation]:
    """Every question plain and under each prefix."""
    conversations = [[{"role": "user", "content": q}] for q in QUESTIONS]
    return [Conversation(c, p) for c in conversations for p in (None, *prefixes_used)]


def installed(folder: Path, name: str, source: str, group: str) -> None:
    """A package as pip would leave it: a module `trimtab_NAME`, and metadata with its entry point in a group."""
    (folder / f"trimtab_{name}.py").write_text(source)
    metadata = folder / f"trimtab_{name}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: trimtab-{name}\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[{group}]\n{name} = trimtab_{name}\n")


def signal_row(number: int, question: str, truthful: bool | None, psi: torch.Tensor, history: torch.Tensor) -> dict:
    """A line of a data set of signals, of an answer of four tokens."""
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


def signal_set(folder: Path, base: BaseModel, layers: tuple[int, int], seed: int = 0) -> Path:
    """A data set of 400 answers in which the last layer's last state tells the truth, with noise; some are unlabelled."""
    meta = DatasetMetadata(base.name, base.fingerprint, layers, base.width, "fp32", None, "")
    begin_dataset(folder, meta)
    generator = torch.Generator().manual_seed(seed)
    for part in range(4):
        rows = [_signals(part * 100 + i, base.width, generator, seed) for i in range(100)]
        append_part(folder, meta, rows)
    return folder


def _signals(number: int, width: int, generator: torch.Generator, seed: int) -> dict:
    truthful = bool(torch.rand(1, generator=generator) < 0.6)
    psi = torch.randn(2, 3 * width, generator=generator)
    psi[1, :100] += truthful
    history = torch.randn(4, 3, generator=generator).abs() * torch.tensor([-1.0, 1.0, 1.0])
    question = f"Question {number}{f' of {seed}' if seed else ''}?"
    return signal_row(number, question, None if number % 10 == 0 else truthful, psi, history)


def plain(figure: Metric, risk: np.ndarray, made_up: np.ndarray) -> float:
    """A figure of risks with every answer once."""
    return float(figure(risk, made_up, np.ones((1, len(risk)), dtype=int))[0])


def save_random_prefix(base: BaseModel, name: str, seed: int, folder: Path) -> Path:
    """Save a prefix with random vectors, and return its folder."""
    vectors = torch.randn(1, base.width, generator=torch.Generator().manual_seed(seed))
    card = PrefixCard("prefix", name, base.name, base.fingerprint, "system", 0, 0, "", metrics={"test_balanced": 0.7})
    return save_prefix(build_prefix(vectors, card), folder / f"{name}{seed}")
