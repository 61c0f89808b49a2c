"""The best single token of the vocabulary as a prefix: what can be reached without learning a vector."""

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from trimtab.artifacts.card import FILE, PrefixCard
from trimtab.artifacts.prefix import Prefix, build_prefix, load_prefix, save_prefix
from trimtab.data.hard_filter import TrainingRow
from trimtab.data.prompt import compute_prompts_digest
from trimtab.generation_types import Progress
from trimtab.jobs.align.config import AlignConfig
from trimtab.jobs.align.dataset import PreparedDataset
from trimtab.jobs.runtime.cluster import run_task
from trimtab.jobs.study.config import StudyConfig
from trimtab.model.base_model import BaseModel, resolve_on_node
from trimtab.model.chat_template import build_renderer
from trimtab.model.frozen_model import FrozenModel, TrainingExample, split_into_micro_batches, tokenize_sample
from trimtab.model.objective_inputs import ObjectiveScorer, compute_totals
from trimtab.objectives.likelihood import Likelihood
from trimtab.ray_connection import get_max_node_cores
from trimtab.types import RANDOM_ARM, TOKEN_ARM


def build_baselines(
    config: StudyConfig, first: AlignConfig, base: BaseModel, prepared: PreparedDataset, folder: Path
) -> dict[str, Prefix]:
    """Arms that nothing is trained for: a random vector for each seed, and the best vocabulary token."""
    made: dict[str, Prefix] = {}
    card = PrefixCard("prefix", "random", base.name, base.fingerprint, first.place, 0, 0, "")
    if config.random:
        mean, spread = run_task(
            "vocabulary", "trimtab.jobs.study.baselines:compute_vocabulary_statistics", base, cpus=1, gpus=0
        )
        for seed in config.seeds:
            noise = torch.randn(1, base.width, generator=torch.Generator().manual_seed(seed))
            made[f"{RANDOM_ARM}#{seed}"] = build_prefix(mean + spread * noise, card)
    if config.token:
        rows_used = compute_prompts_digest([row.prompt for row in prepared.train])
        of = [base.fingerprint, first.place, first.train.longest, config.token, rows_used]
        path = folder / f"best-token-{hashlib.sha256(json.dumps(of).encode()).hexdigest()[:12]}"
        if not (path / FILE).exists():
            found = run_task(
                "best token",
                "trimtab.jobs.study.baselines:search_best_token",
                first,
                base,
                prepared,
                config.token,
                cpus=get_max_node_cores(),
                gpus=first.scale.gpus,
            )
            save_prefix(build_prefix(found.vector, replace(card, name="token", method={"token": found.text})), path)
        made[TOKEN_ARM] = load_prefix(path)
    return made


ROWS = 32
MICRO_BATCH = 8


@dataclass(frozen=True)
class BestToken:
    """The token with the lowest loss: its vector [1, d] and its text."""

    vector: Tensor
    text: str
    loss: float


def compute_vocabulary_statistics(tell: Progress, base: BaseModel) -> tuple[Tensor, Tensor]:
    """Mean [1, d] and standard deviation [d] of the base model's embedding rows."""
    embedding = cast(nn.Embedding, resolve_on_node(base).load("fp32").get_input_embeddings())
    table = embedding.weight.detach()
    return table.mean(0, keepdim=True).clone(), table.std(0).clone()


def search_best_token(
    tell: Progress, config: AlignConfig, base: BaseModel, prepared: PreparedDataset, candidates: int
) -> BestToken:
    """The best of `candidates` tokens by their mean loss on training rows of both sides.

    Candidates are those whose embedding the loss's gradient at the mean of the vocabulary points to most (HotFlip, Ebrahimi et
    al. 2018, one step); each is then tried.
    """
    local = resolve_on_node(base)
    renderer = build_renderer(local, 1)
    frozen = FrozenModel(local.load(config.train.precision), renderer.first_row)
    frozen.enable_prefix_tree()
    sides: list[list[TrainingRow]] = [
        [r for r in prepared.train if (r.prompt.label == "harmful") == side] for side in (True, False)
    ]
    rows = [row for side in sides for row in side[:: max(1, len(side) // (ROWS // 2))][: ROWS // 2]]
    examples = [
        TrainingExample(tokenize_sample(renderer, r.prompt, r.target, config.place, 1, config.train.longest), r.prompt.label)
        for r in rows
    ]
    scorer = ObjectiveScorer(frozen, Likelihood())
    parts = split_into_micro_batches(examples, MICRO_BATCH)
    table = frozen.embedding.weight.detach().float().cpu()[: renderer.first_row]
    whole, nothing = compute_totals(examples), torch.empty(0)
    slope = sum((scorer.compute(table.mean(0, keepdim=True), p, whole, nothing).gradient for p in parts), torch.zeros(()))
    tried = (table @ slope[0]).topk(candidates, largest=False).indices.tolist()
    losses: list[float] = []
    for number, token in enumerate(tried, 1):
        with torch.no_grad():
            losses.append(
                sum(scorer.compute_scores(table[token : token + 1], p, nothing).nll.sum().item() for p in parts) / len(examples)
            )
        tell(number, candidates)
    best = min(range(candidates), key=losses.__getitem__)
    return BestToken(table[tried[best]][None].clone(), str(renderer.tokenizer.decode([tried[best]])), losses[best])
