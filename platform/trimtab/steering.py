"""One training step of a prefix on a frozen model: what every objective shares, on any device, with no cluster in it.

Micro-batches are cut from a batch in one way whatever the number of workers, and their gradients are added in one
order. So a run gives the same prefix on one worker and on many, and after any number of restarts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax, pad
from transformers import PreTrainedModel

from trimtab.chat import Renderer
from trimtab.data.rows import Prompt
from trimtab.errors import UsageError
from trimtab.objectives import Objective, Scores
from trimtab.words import Place


@dataclass(frozen=True)
class Example:
    """A row as token ids: `ids` are prompt and target, of which the last `targets` are learned from; `reference` is the same
    without the prefix, for the drift term. `weight` is a_c of METHODS."""

    ids: tuple[int, ...]
    targets: int
    label: str
    weight: float = 1.0
    reference: tuple[int, ...] | None = None


@dataclass(frozen=True)
class StepResult:
    """Sums over one micro-batch: `gradient` [k, d] of the weighted loss sum, and for each class the sum of plain
    per-token losses and the number of rows."""

    gradient: Tensor
    loss: float
    nll: dict[str, float]
    rows: dict[str, int]


def example(
    renderer: Renderer, prompt: Prompt, target: str, place: Place, rows: int, longest: int, reference: bool, weight: float
) -> Example:
    """Render a row; at most `longest` target tokens are learned from."""
    row_ids = range(renderer.first_row, renderer.first_row + rows)
    said = [*prompt.messages, {"role": "assistant", "content": target}]
    ids, spans = renderer.conversation(said, place, row_ids)
    answer = spans[-1][:longest]
    plain = (*renderer.prompt(prompt.messages), *ids[answer.start : answer.stop]) if reference else None
    return Example(tuple(ids[: answer.stop]), len(answer), prompt.label, weight, plain)


def micro_batches(examples: Sequence[Example], size: int) -> list[list[Example]]:
    """Cut a batch into micro-batches of like lengths, the longest first; independent of the number of workers."""
    ordered = sorted(examples, key=lambda e: (-len(e.ids), e.ids))
    return [ordered[i : i + size] for i in range(0, len(ordered), size)]


def share(batches: Sequence[list[Example]], rank: int, workers: int) -> list[int]:
    """Indices of the micro-batches that one worker computes: each goes to the worker with the fewest tokens so far."""
    loads = [0] * workers
    mine: list[int] = []
    for index, batch in enumerate(batches):
        least = loads.index(min(loads))
        loads[least] += len(batch[0].ids) * len(batch)
        if least == rank:
            mine.append(index)
    return mine


class FrozenModel:
    """A frozen causal model that takes prefix vectors in the place of row tokens."""

    def __init__(self, model: PreTrainedModel, first_row: int) -> None:
        self.model = model
        self.first_row = first_row
        # transformers knows tables and heads as modules of any kind.
        self.embedding = cast(nn.Embedding, model.get_input_embeddings())
        # Models that scale their embeddings do it inside the table; a row of the serving engine is scaled too.
        self.scale = getattr(self.embedding, "embed_scale", 1.0)
        self.device = self.embedding.weight.device
        self.dtype = self.embedding.weight.dtype

    def target_logits(self, vectors: Tensor | None, ids: Sequence[Sequence[int]], targets: Sequence[int]) -> Tensor:
        """Logits [sum(targets), V] in float32 that predict the last `targets[i]` tokens of each sequence.

        The head runs only where there are targets: with a large vocabulary it would else cost more than the model.
        """
        longest = max(map(len, ids))
        tokens = torch.tensor([[*row, *[0] * (longest - len(row))] for row in ids], device=self.device)
        lengths = torch.tensor([len(row) for row in ids], device=self.device)
        attention = torch.arange(longest, device=self.device)[None] < lengths[:, None]
        is_row = tokens >= self.first_row
        embedded = self.embedding(tokens.masked_fill(is_row, 0))
        if vectors is not None:
            values = (vectors * self.scale).to(self.dtype)
            embedded = embedded.masked_scatter(is_row[..., None], values.repeat(len(ids), 1))
        hidden = self.model.get_decoder()(
            inputs_embeds=embedded, attention_mask=attention.long(), use_cache=False
        ).last_hidden_state
        chosen = torch.cat(
            [hidden[i, len(row) - n - 1 : len(row) - 1] for i, (row, n) in enumerate(zip(ids, targets, strict=True))]
        )
        return self._head(chosen)

    def check_head(self) -> None:
        """UsageError where head and decoder do not make up the model (a scaled or capped head of its own kind)."""
        ids = torch.arange(5, 13, device=self.device)[None]
        with torch.no_grad():
            whole = self.model(input_ids=ids, use_cache=False).logits[0, -4:].float()
            ours = self.target_logits(None, ids.tolist(), [3])
        if not torch.allclose(whole[:3], ours, atol=0.05, rtol=0.05):
            raise UsageError(f"{type(self.model).__name__} computes its logits in a way that trimtab does not know")

    def _head(self, hidden: Tensor) -> Tensor:
        head = cast(nn.Module, self.model.get_output_embeddings())
        logits = head(hidden).float()
        config = self.model.config.get_text_config()
        if scaling := getattr(config, "logits_scaling", None):
            logits = logits / scaling
        if scale := getattr(config, "logit_scale", None):
            logits = logits * scale
        if cap := getattr(config, "final_logit_softcapping", None):
            logits = torch.tanh(logits / cap) * cap
        return logits


def compute(frozen: FrozenModel, vectors: Tensor, batch: Sequence[Example], objective: Objective, total: float) -> StepResult:
    """Loss and gradient of one micro-batch.

    `vectors` float32 [k, d]; `total` is the sum of row weights of the whole batch over all workers, so that gradients of
    micro-batches add up to that of the batch.
    """
    leaf = vectors.detach().requires_grad_()
    scores = score(frozen, leaf, batch, objective.needs_drift)
    weights = torch.tensor([e.weight for e in batch], device=frozen.device)
    loss = (objective(scores) * weights).sum() / total
    (gradient,) = torch.autograd.grad(loss, leaf)
    return StepResult(gradient.float().cpu(), loss.item(), *summarise(scores, batch))


def score(frozen: FrozenModel, vectors: Tensor | None, batch: Sequence[Example], drift: bool = False) -> Scores:
    """Log-probabilities of the targets of a micro-batch, as objectives take them."""
    targets = [e.targets for e in batch]
    logits = frozen.target_logits(vectors, [e.ids for e in batch], targets)
    wanted = torch.tensor([t for e in batch for t in e.ids[-e.targets :]], device=frozen.device)
    logp = log_softmax(logits, -1)
    chosen = logp.gather(1, wanted[:, None])[:, 0]
    longest = max(targets)
    rows = torch.stack([pad(part, (0, longest - len(part))) for part in chosen.split(targets)])
    mask = torch.stack([pad(torch.ones(n, device=frozen.device), (0, longest - n)) for n in targets])
    drifts = _drift(frozen, logp, batch) if drift else torch.zeros(len(batch), device=frozen.device)
    return Scores(rows, mask, drifts)


def summarise(scores: Scores, batch: Sequence[Example]) -> tuple[dict[str, float], dict[str, int]]:
    """For each class, the sum of its rows' mean negative log-probabilities and their number."""
    nll = (-(scores.logp * scores.mask).sum(1) / scores.mask.sum(1)).detach().tolist()
    sums: dict[str, float] = {}
    counts: dict[str, int] = {}
    for e, value in zip(batch, nll, strict=True):
        sums[e.label] = sums.get(e.label, 0.0) + value
        counts[e.label] = counts.get(e.label, 0) + 1
    return sums, counts


def _drift(frozen: FrozenModel, logp: Tensor, batch: Sequence[Example]) -> Tensor:
    """Mean KL(base || prefixed) [B] over each row's target tokens; zero for rows without a reference."""
    drifts = logp.new_zeros(len(batch))
    chosen = [i for i, e in enumerate(batch) if e.reference is not None]
    if not chosen:
        return drifts
    references = [batch[i] for i in chosen]
    with torch.no_grad():
        plain = frozen.target_logits(None, [e.reference or () for e in references], [e.targets for e in references])
        base = log_softmax(plain, -1)
    parts = logp.split([e.targets for e in batch])
    bases = base.split([e.targets for e in references])
    means = [(b.exp() * (b - parts[i])).sum(-1).mean() for i, b in zip(chosen, bases, strict=True)]
    return drifts.index_put((torch.tensor(chosen, device=drifts.device),), torch.stack(means))
