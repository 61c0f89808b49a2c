"""Arms of a study, with untrained baselines: an empty system prompt, random vectors and the best vocabulary token."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from trimtab.artifacts.card import FILE, PrefixCard
from trimtab.artifacts.prefix import Prefix, build_prefix, load_prefix, save_prefix
from trimtab.data.hard_filter import TrainingRow
from trimtab.data.prompt import compute_prompts_digest
from trimtab.evaluation.safety.results import Arm
from trimtab.generation_types import Progress
from trimtab.jobs.align.config import AlignConfig
from trimtab.jobs.align.dataset import PreparedDataset
from trimtab.jobs.evaluate.variants import build_standard_arms
from trimtab.jobs.runtime.cluster import run_task
from trimtab.jobs.study.config import StudyConfig
from trimtab.model.base_model import BaseModel, resolve_on_node
from trimtab.model.chat_template import build_renderer
from trimtab.model.frozen_model import FrozenModel, TrainingExample, split_into_micro_batches, tokenize_sample
from trimtab.model.objective_inputs import ObjectiveScorer, compute_totals
from trimtab.model.reference_outputs import ReferenceOutputs
from trimtab.objectives.likelihood import Likelihood
from trimtab.ray_connection import get_max_node_cores
from trimtab.types import EMPTY_ARM, RANDOM_ARM, TOKEN_ARM
from trimtab.util.identifiers import compute_key


def build_study_arms(base: BaseModel, prefixes: Mapping[str, Prefix]) -> list[Arm]:
    """Build the arms of a study.

    If the chat template adds a system message by itself, a prefix at position `system` replaces it. An arm with an empty system
    message then shows what this change does alone.

    Args:
        base: base model.
        prefixes: trained and untrained prefixes by arm name.
    """
    plain, *others = build_standard_arms(prefixes)
    empty = [Arm(EMPTY_ARM, system="")] if build_renderer(base, 1).default_system else []
    return [plain, *empty, *others]


def build_baselines(
    config: StudyConfig, first: AlignConfig, base: BaseModel, prepared: PreparedDataset, folder: Path
) -> dict[str, Prefix]:
    """Build the arms that need no training: a random vector per seed and the best vocabulary token.

    Args:
        config: settings of the study, which enable each baseline.
        first: settings of the study's first arm, which give place, length limit and hardware.
        base: base model.
        prepared: rows that the token search computes its loss on.
        folder: folder that stores the result of the token search.

    Returns:
        Prefixes by arm name, `ARM#SEED` for random vectors.
    """
    prefixes: dict[str, Prefix] = {}
    card = PrefixCard("prefix", "random", base.name, base.fingerprint, first.position, 0, 0, "")
    if config.random_baseline:
        mean, spread = run_task(
            "vocabulary", "trimtab.jobs.study.baselines:compute_vocabulary_statistics", base, cpus=1, gpus=0
        )
        for seed in config.seeds:
            noise = torch.randn(1, base.width, generator=torch.Generator().manual_seed(seed))
            prefixes[f"{RANDOM_ARM}#{seed}"] = build_prefix(mean + spread * noise, card)
    if config.token_candidates:
        rows_digest = compute_prompts_digest([row.prompt for row in prepared.train])
        identity = [base.fingerprint, first.position, first.train.max_target_tokens, config.token_candidates, rows_digest]
        path = folder / f"best-token-{compute_key(json.dumps(identity), 12)}"
        if not (path / FILE).exists():
            best = run_task(
                "best token",
                "trimtab.jobs.study.baselines:search_best_token",
                first,
                base,
                prepared,
                config.token_candidates,
                cpus=get_max_node_cores(),
                gpus=first.scale.gpus_per_worker,
            )
            save_prefix(build_prefix(best.vector, replace(card, name="token", method={"token": best.text})), path)
        prefixes[TOKEN_ARM] = load_prefix(path)
    return prefixes


ROWS = 32
MICRO_BATCH = 8


@dataclass(frozen=True)
class BestToken:
    """Vocabulary token with the lowest loss.

    Attributes:
        vector: embedding of the token, [1, d].
        text: decoded text of the token.
        loss: mean loss per row (nats).
    """

    vector: Tensor
    text: str
    loss: float


def compute_vocabulary_statistics(progress: Progress, base: BaseModel) -> tuple[Tensor, Tensor]:
    """Compute mean and standard deviation of the base model's token embeddings; runs as a Ray task.

    Args:
        progress: callback that reports progress; unused.
        base: base model.

    Returns:
        Mean [1, d] and standard deviation [d].
    """
    embedding = cast(nn.Embedding, resolve_on_node(base).load("fp32").get_input_embeddings())
    table = embedding.weight.detach()
    return table.mean(0, keepdim=True).clone(), table.std(0).clone()


def search_best_token(
    progress: Progress, config: AlignConfig, base: BaseModel, prepared: PreparedDataset, candidates: int
) -> BestToken:
    """Search the vocabulary token with the lowest mean loss on training rows of both sides; runs as a Ray task.

    One step of HotFlip (Ebrahimi et al. 2018) selects the candidates: the tokens whose embeddings have the smallest inner
    product with the gradient of the loss at the mean of the vocabulary. The loss of every candidate is then computed.

    Args:
        progress: callback that receives the number of evaluated candidates and their total.
        config: settings of the arm that gives place, length limit and precision.
        base: base model.
        prepared: rows of the study.
        candidates: number of tokens to evaluate.

    Returns:
        The token with the lowest loss.
    """
    local = resolve_on_node(base)
    renderer = build_renderer(local, 1)
    frozen = FrozenModel(local.load(config.train.dtype), renderer.first_slot)
    frozen.enable_prefix_tree()
    sides: list[list[TrainingRow]] = [
        [r for r in prepared.train if (r.prompt.label == "harmful") == side] for side in (True, False)
    ]
    rows = [row for side in sides for row in side[:: max(1, len(side) // (ROWS // 2))][: ROWS // 2]]
    examples = [
        TrainingExample(
            tokenize_sample(renderer, r.prompt, r.target, config.position, 1, config.train.max_target_tokens), r.prompt.label
        )
        for r in rows
    ]
    scorer = ObjectiveScorer(ReferenceOutputs(frozen), Likelihood())
    parts = split_into_micro_batches(examples, MICRO_BATCH)
    table = frozen.embedding.weight.detach().float().cpu()[: renderer.first_slot]
    totals, empty = compute_totals(examples), torch.empty(0)
    gradient = sum((scorer.compute(table.mean(0, keepdim=True), p, totals, empty).gradient for p in parts), torch.zeros(()))
    tokens = (table @ gradient[0]).topk(candidates, largest=False).indices.tolist()
    losses: list[float] = []
    for number, token in enumerate(tokens, 1):
        with torch.no_grad():
            losses.append(
                sum(scorer.compute_scores(table[token : token + 1], p, empty).nll.sum().item() for p in parts) / len(examples)
            )
        progress(number, candidates)
    best = min(range(candidates), key=losses.__getitem__)
    return BestToken(table[tokens[best]][None].clone(), str(renderer.tokenizer.decode([tokens[best]])), losses[best])
