"""How well the frozen model reads neutral text under an arm, and how far the arm moves its predictions from the base model's.

Each text is the assistant's answer to its prompt, and is read token by token, whatever the model itself would have said.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from trimtab.data.prompt import Prompt
from trimtab.errors import UsageError
from trimtab.evaluation.safety.results import Arm
from trimtab.generation_types import Progress
from trimtab.model.chat_template import ChatRenderer
from trimtab.model.frozen_model import FrozenModel

# Log-probabilities that are held at once for one arm: 128 MiB in float32.
NUMBERS = 1 << 25
TEXTS = 16


@dataclass(frozen=True)
class TextScore:
    """One text under one arm: `tokens` of it were read, `nll` is the sum of their negative log-probabilities, and `kl` that of
    KL(base || arm) over the whole vocabulary before each of them, in nats."""

    tokens: int
    nll: float
    kl: float


@dataclass(frozen=True)
class TokenizedText:
    """A conversation as token ids, of which the last `targets` are the text."""

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
    """Readings of every arm, text by text. `longest` tokens of each text at most; the token that ends an answer is left out.

    Raises UsageError for a text without tokens or with the text of a row token, and where the model's logits are unknown.
    """
    frozen.check_head()
    readings: list[dict[int, TextScore]] = [{} for _ in arms]
    plain = [_ids(renderer, Arm("base"), text, longest) for text in texts]
    done = 0
    for batch in _batches(plain, frozen.embedding.weight.shape[0]):
        base = _logp(frozen, None, [plain[i] for i in batch])
        for number, arm in enumerate(arms):
            steered = [_ids(renderer, arm, texts[i], longest) for i in batch]
            vectors = arm.prefix.vectors.to(frozen.device) if arm.prefix else None
            same = all(s.ids == plain[i].ids for s, i in zip(steered, batch, strict=True))
            logp = base if same and vectors is None else _logp(frozen, vectors, steered)
            drift = torch.zeros(len(base)) if logp is base else (base.exp() * (base - logp)).sum(-1).cpu()
            own = torch.tensor([token for s in steered for token in s.ids[-s.targets :]], device=logp.device)
            nll = -logp.gather(1, own[:, None])[:, 0].cpu()
            sizes = [s.targets for s in steered]
            for i, n, k in zip(batch, nll.split(sizes), drift.split(sizes), strict=True):
                readings[number][i] = TextScore(len(n), n.double().sum().item(), max(0.0, k.double().sum().item()))
            done += len(batch)
            if progress:
                progress(done, len(arms) * len(texts))
    return [[mine[i] for i in range(len(texts))] for mine in readings]


def _ids(renderer: ChatRenderer, arm: Arm, text: Prompt, longest: int) -> TokenizedText:
    rows = range(renderer.first_row, renderer.first_row + len(arm.prefix.vectors)) if arm.prefix else range(0)
    before = renderer.render_prompt(arm.build_ask(text).messages, arm.prefix.card.place if arm.prefix else "system", rows)
    target = renderer.render_answer(text.target or "", before)[:-1][:longest]
    if not target:
        raise UsageError(f"the text that answers {text.prompt[:40]!r} is empty")
    ids = [*before, *target]
    renderer.check_rows(ids, rows)
    return TokenizedText(ids, len(target))


def _batches(texts: Sequence[TokenizedText], vocabulary: int) -> Iterator[list[int]]:
    """Indices of texts of like lengths, as many as fit."""
    batch: list[int] = []
    tokens = 0
    for i in sorted(range(len(texts)), key=lambda i: len(texts[i].ids)):
        tokens += texts[i].targets
        if batch and (tokens * vocabulary > NUMBERS or len(batch) == TEXTS):
            yield batch
            batch, tokens = [], texts[i].targets
        batch.append(i)
    if batch:
        yield batch


@torch.no_grad()
def _logp(frozen: FrozenModel, vectors: Tensor | None, texts: Sequence[TokenizedText]) -> Tensor:
    """Log-probabilities [sum(targets), V] in float32 before each token of the texts."""
    return log_softmax(frozen.target_logits(vectors, [t.ids for t in texts], [t.targets for t in texts]), -1)
