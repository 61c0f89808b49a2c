"""Scoring of neutral text under an arm: negative log-likelihood, and KL divergence from the base model.

Each text is scored by teacher forcing, as the assistant's answer to its prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from trimtab.data.prompt import Prompt
from trimtab.errors import UsageError
from trimtab.evaluation.safety.results import Arm
from trimtab.generation_types import Progress
from trimtab.model.batching import build_batches
from trimtab.model.chat_template import ChatRenderer
from trimtab.model.frozen_model import FrozenModel

# Limit of a batch, in log-probabilities of one arm: 128 MiB in float32.
NUMBERS = 1 << 25
TEXTS = 16


@dataclass(frozen=True)
class TextScore:
    """Score of one text under one arm.

    Attributes:
        tokens: number of scored tokens.
        nll: sum of their negative log-probabilities, in nats.
        kl: sum of KL(base || arm) over the whole vocabulary at each of them, in nats.
    """

    tokens: int
    nll: float
    kl: float


@dataclass(frozen=True)
class TokenizedText:
    """Token ids of a conversation, of which the last `targets` belong to the text."""

    ids: list[int]
    targets: int


def score_texts(
    frozen: FrozenModel,
    renderer: ChatRenderer,
    arms: Sequence[Arm],
    texts: Sequence[Prompt],
    longest: int,
    progress: Progress | None = None,
) -> list[list[TextScore]]:
    """Score every text under every arm.

    Args:
        frozen: the frozen model.
        renderer: chat template of the model.
        arms: arms to score under.
        texts: prompts whose targets are the texts.
        longest: maximum number of tokens of each text; the end-of-answer token is never scored.
        progress: callback that gets the number of finished texts over all arms, and their total.

    Returns:
        Scores of each arm, in the order of `texts`.

    Raises:
        UsageError: if a text has no tokens or contains a row token, or if the model computes its logits in an unsupported way.
    """
    frozen.check_head()
    scores: list[dict[int, TextScore]] = [{} for _ in arms]
    plain = [_tokenize(renderer, Arm("base"), text, longest) for text in texts]
    done = 0
    for batch in _build_batches(plain, frozen.embedding.weight.shape[0]):
        base = _compute_log_probs(frozen, None, [plain[i] for i in batch])
        for number, arm in enumerate(arms):
            steered = [_tokenize(renderer, arm, texts[i], longest) for i in batch]
            vectors = arm.prefix.vectors.to(frozen.device) if arm.prefix else None
            same = all(s.ids == plain[i].ids for s, i in zip(steered, batch, strict=True))
            logp = base if same and vectors is None else _compute_log_probs(frozen, vectors, steered)
            kl = torch.zeros(len(base)) if logp is base else (base.exp() * (base - logp)).sum(-1).cpu()
            targets = torch.tensor([token for s in steered for token in s.ids[-s.targets :]], device=logp.device)
            nll = -logp.gather(1, targets[:, None])[:, 0].cpu()
            sizes = [s.targets for s in steered]
            for i, n, k in zip(batch, nll.split(sizes), kl.split(sizes), strict=True):
                scores[number][i] = TextScore(len(n), n.double().sum().item(), max(0.0, k.double().sum().item()))
            done += len(batch)
            if progress:
                progress(done, len(arms) * len(texts))
    return [[by_text[i] for i in range(len(texts))] for by_text in scores]


def _tokenize(renderer: ChatRenderer, arm: Arm, text: Prompt, longest: int) -> TokenizedText:
    rows = range(renderer.first_slot, renderer.first_slot + len(arm.prefix.vectors)) if arm.prefix else range(0)
    prompt = renderer.render_prompt(
        arm.build_conversation(text).messages, arm.prefix.card.position if arm.prefix else "system", rows
    )
    target = renderer.render_answer(text.target or "", prompt)[:-1][:longest]
    if not target:
        raise UsageError(f"the text that answers {text.prompt[:40]!r} is empty")
    ids = [*prompt, *target]
    renderer.check_slots(ids, rows)
    return TokenizedText(ids, len(target))


def _build_batches(texts: Sequence[TokenizedText], vocabulary: int) -> list[list[int]]:
    """Group indices of texts into batches within the limits NUMBERS and TEXTS, the shortest texts first."""
    return build_batches(
        sorted(range(len(texts)), key=lambda i: len(texts[i].ids)),
        lambda batch: len(batch) <= TEXTS and sum(texts[i].targets for i in batch) * vocabulary <= NUMBERS,
    )


@torch.no_grad()
def _compute_log_probs(frozen: FrozenModel, vectors: Tensor | None, texts: Sequence[TokenizedText]) -> Tensor:
    """Compute the log-probabilities [sum(targets), V], float32, of each target token's position."""
    return log_softmax(frozen.target_logits(vectors, [t.ids for t in texts], [t.targets for t in texts]), -1)
