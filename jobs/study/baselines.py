"""The best single token of the vocabulary as a prefix: what can be reached without learning a vector."""

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from trimtab import ray_connection
from trimtab.artifacts import card as cards
from trimtab.artifacts import prefix as prefixes
from trimtab.artifacts.card import Card
from trimtab.artifacts.prefix import Prefix
from trimtab.data import prompt as rows
from trimtab.data.hard_filter import Row
from trimtab.generation_types import Progress
from trimtab.jobs.align.config import AlignConfig
from trimtab.jobs.align.dataset import Prepared
from trimtab.jobs.runtime.cluster import run_task
from trimtab.jobs.study.config import StudyConfig
from trimtab.model import base_model, chat_template
from trimtab.model.base_model import BaseModel
from trimtab.model.frozen_model import Example, FrozenModel, micro_batches, sample
from trimtab.model.objective_inputs import Scorer, totals
from trimtab.objectives.likelihood import Likelihood
from trimtab.types import RANDOM_ARM, TOKEN_ARM


def build_baselines(
    config: StudyConfig, first: AlignConfig, base: BaseModel, prepared: Prepared, folder: Path
) -> dict[str, Prefix]:
    """Arms that nothing is trained for: a random vector for each seed, and the best vocabulary token."""
    made: dict[str, Prefix] = {}
    card = Card("prefix", "random", base.name, base.fingerprint, first.place, 0, 0, "")
    if config.random:
        mean, spread = run_task("vocabulary", "trimtab.jobs.study.baselines:vocabulary", base, cpus=1, gpus=0)
        for seed in config.seeds:
            noise = torch.randn(1, base.width, generator=torch.Generator().manual_seed(seed))
            made[f"{RANDOM_ARM}#{seed}"] = prefixes.make(mean + spread * noise, card)
    if config.token:
        rows_used = rows.digest([row.prompt for row in prepared.train])
        of = [base.fingerprint, first.place, first.train.longest, config.token, rows_used]
        path = folder / f"best-token-{hashlib.sha256(json.dumps(of).encode()).hexdigest()[:12]}"
        if not (path / cards.FILE).exists():
            found = run_task(
                "best token",
                "trimtab.jobs.study.baselines:best_token",
                first,
                base,
                prepared,
                config.token,
                cpus=ray_connection.cores(),
                gpus=first.scale.gpus,
            )
            prefixes.save(prefixes.make(found.vector, replace(card, name="token", method={"token": found.text})), path)
        made[TOKEN_ARM] = prefixes.load(path)
    return made


ROWS = 32
MICRO_BATCH = 8


@dataclass(frozen=True)
class Found:
    """The token with the lowest loss: its vector [1, d] and its text."""

    vector: Tensor
    text: str
    loss: float


def vocabulary(tell: Progress, base: BaseModel) -> tuple[Tensor, Tensor]:
    """Mean [1, d] and standard deviation [d] of the base model's embedding rows."""
    embedding = cast(nn.Embedding, base_model.here(base).load("fp32").get_input_embeddings())
    table = embedding.weight.detach()
    return table.mean(0, keepdim=True).clone(), table.std(0).clone()


def best_token(tell: Progress, config: AlignConfig, base: BaseModel, prepared: Prepared, candidates: int) -> Found:
    """The best of `candidates` tokens by their mean loss on training rows of both sides.

    Candidates are those whose embedding the loss's gradient at the mean of the vocabulary points to most (HotFlip, Ebrahimi et
    al. 2018, one step); each is then tried.
    """
    local = base_model.here(base)
    renderer = chat_template.renderer(local, 1)
    frozen = FrozenModel(local.load(config.train.precision), renderer.first_row)
    frozen.pack()
    sides: list[list[Row]] = [[r for r in prepared.train if (r.prompt.label == "harmful") == side] for side in (True, False)]
    rows = [row for side in sides for row in side[:: max(1, len(side) // (ROWS // 2))][: ROWS // 2]]
    examples = [
        Example(sample(renderer, r.prompt, r.target, config.place, 1, config.train.longest), r.prompt.label) for r in rows
    ]
    scorer = Scorer(frozen, Likelihood())
    parts = micro_batches(examples, MICRO_BATCH)
    table = frozen.embedding.weight.detach().float().cpu()[: renderer.first_row]
    whole, nothing = totals(examples), torch.empty(0)
    slope = sum((scorer.compute(table.mean(0, keepdim=True), p, whole, nothing).gradient for p in parts), torch.zeros(()))
    tried = (table @ slope[0]).topk(candidates, largest=False).indices.tolist()
    losses: list[float] = []
    for number, token in enumerate(tried, 1):
        with torch.no_grad():
            losses.append(
                sum(scorer.scores(table[token : token + 1], p, nothing).nll.sum().item() for p in parts) / len(examples)
            )
        tell(number, candidates)
    best = min(range(candidates), key=losses.__getitem__)
    return Found(table[tried[best]][None].clone(), str(renderer.tokenizer.decode([tried[best]])), losses[best])
