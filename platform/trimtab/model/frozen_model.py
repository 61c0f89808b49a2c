"""Rows as token ids, cut into micro-batches, and the frozen model that takes vectors in the place of row tokens.

Micro-batches are cut from a batch in one way whatever the number of workers, and their gradients are added in one
order. So a run gives the same prefix on one worker and on many, and after any number of restarts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from trimtab.data.prompt import Prompt
from trimtab.errors import UsageError
from trimtab.model.chat_template import ChatRenderer
from trimtab.model.chunked_logprobs import compute_token_logprobs
from trimtab.model.prefix_tree import build_prefix_tree, compute_states, disable_tree_attention, enable_tree_attention
from trimtab.types import Position

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class TokenizedSample:
    """A prompt and an answer as token ids, with the prefix's row tokens (`ids`) and without them (`plain`); the last `targets`
    tokens are the answer."""

    ids: tuple[int, ...]
    plain: tuple[int, ...]
    targets: int


@dataclass(frozen=True)
class TrainingExample:
    """A training row: the answer that is wanted, the one that is not where the objective needs it, and the weight
    a_c above 0 of its class."""

    chosen: TokenizedSample
    label: str
    weight: float = 1.0
    rejected: TokenizedSample | None = None


def tokenize_sample(
    renderer: ChatRenderer, prompt: Prompt, answer: str, place: Position, rows: int, longest: int
) -> TokenizedSample:
    """Render a prompt with an answer, of which at most `longest` tokens are kept."""
    said = [*prompt.messages, {"role": "assistant", "content": answer}]
    ids, spans = renderer.render_conversation(said, place, range(renderer.first_row, renderer.first_row + rows))
    kept = spans[-1][:longest]
    plain = (*renderer.render_prompt(prompt.messages), *ids[kept.start : kept.stop])
    return TokenizedSample(tuple(ids[: kept.stop]), plain, len(kept))


def split_into_micro_batches(examples: Sequence[TrainingExample], size: int) -> list[list[TrainingExample]]:
    """Cut a batch into micro-batches of like lengths, the longest first; independent of the number of workers."""
    ordered = sorted(examples, key=lambda e: (-len(e.chosen.ids), e.chosen.ids))
    return [ordered[i : i + size] for i in range(0, len(ordered), size)]


def select_worker_share(batches: Sequence[list[TrainingExample]], rank: int, workers: int) -> list[int]:
    """Indices of the micro-batches that one worker computes: each goes to the worker with the fewest tokens so far."""
    loads = [0] * workers
    mine: list[int] = []
    for index, batch in enumerate(batches):
        least = loads.index(min(loads))
        loads[least] += len(batch[0].chosen.ids) * len(batch)
        if least == rank:
            mine.append(index)
    return mine


class FrozenModel:
    """A frozen causal model that takes prefix vectors in the place of row tokens."""

    def __init__(self, model: "PreTrainedModel", first_row: int) -> None:
        self.model = model
        self.first_row = first_row
        # transformers knows tables and heads as modules of any kind.
        self.embedding = cast(nn.Embedding, model.get_input_embeddings())
        # Models that scale their embeddings do it inside the table; a row of the serving engine is scaled too.
        self.scale = getattr(self.embedding, "embed_scale", 1.0)
        self.device = self.embedding.weight.device
        self.dtype = self.embedding.weight.dtype
        self.packs = False

    def target_logits(self, vectors: Tensor | None, ids: Sequence[Sequence[int]], targets: Sequence[int]) -> Tensor:
        """Logits [sum(targets), V] in float32 that predict the last `targets[i]` tokens of each sequence."""
        return self.head(self.target_states(vectors, ids, targets))

    def target_states(self, vectors: Tensor | None, ids: Sequence[Sequence[int]], targets: Sequence[int]) -> Tensor:
        """Last hidden states [sum(targets), d] from which the last `targets[i]` tokens of each sequence are predicted.

        The head runs only where there are targets: with a large vocabulary it would else cost more than the model.
        """
        ends = [(len(row) - n - 1, len(row) - 1) for row, n in zip(ids, targets, strict=True)]
        if self.packs:
            packed = build_prefix_tree(ids, self.device)
            hidden = compute_states(self.model, self.embed_inputs(vectors, packed.ids), packed)
            return hidden[torch.cat([packed.paths[i, begin:end] for i, (begin, end) in enumerate(ends)])]
        longest = max(map(len, ids))
        tokens = torch.tensor([[*row, *[0] * (longest - len(row))] for row in ids], device=self.device)
        lengths = torch.tensor([len(row) for row in ids], device=self.device)
        attention = torch.arange(longest, device=self.device)[None] < lengths[:, None]
        hidden = self.model.get_decoder()(
            inputs_embeds=self.embed_inputs(vectors, tokens), attention_mask=attention.long(), use_cache=False
        ).last_hidden_state
        return torch.cat([hidden[i, begin:end] for i, (begin, end) in enumerate(ends)])

    def compute_logprobs(self, states: Tensor, tokens: Sequence[int]) -> Tensor:
        """Log-probability [N] of each token after the last hidden state [N, d] that predicts it."""
        wanted = torch.tensor(tokens, device=self.device)
        return compute_token_logprobs(self.head, states, wanted, self.model.config.get_text_config().vocab_size)

    def embed_inputs(self, vectors: Tensor | None, tokens: Tensor) -> Tensor:
        """Embeddings [..., d] of token ids [...], with `vectors` [k, d] in the place of the k row tokens."""
        is_row = tokens >= self.first_row
        embedded = self.embedding(tokens.masked_fill(is_row, 0))
        if vectors is None:
            return embedded
        values = embedding(tokens.sub(self.first_row).clamp(min=0), vectors * self.scale)
        return torch.where(is_row[..., None], values.to(self.dtype), embedded)

    def enable_prefix_tree(self) -> bool:
        """From now on compute what rows share at their start once, which is faster; False, and nothing changed, where a small
        batch shows that this model cannot."""
        rows = [[5, 6, 7, 8, 9, 10], [5, 6, 7, 8], [5, 6, 11, 12, 13, 7, 8]]
        with torch.no_grad():
            padded = self.target_states(None, rows, [3, 2, 4])
            self.packs = enable_tree_attention(self.model)
            if not self.packs:
                return False
            try:
                same = torch.allclose(self.target_states(None, rows, [3, 2, 4]), padded, atol=0.05, rtol=0.05)
            except (TypeError, RuntimeError):
                same = False
        if not same:
            disable_tree_attention(self.model)
            self.packs = False
        return same

    def check_head(self) -> None:
        """UsageError where head and decoder do not make up the model (a scaled or capped head of its own kind)."""
        ids = torch.arange(5, 13, device=self.device)[None]
        with torch.no_grad():
            whole = self.model(input_ids=ids, use_cache=False).logits[0, -4:].float()
            ours = self.target_logits(None, ids.tolist(), [3])
        if not torch.allclose(whole[:3], ours, atol=0.05, rtol=0.05):
            raise UsageError(f"{type(self.model).__name__} computes its logits in a way that trimtab does not know")

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [N, V] in float32 of last hidden states [N, d], with what a family does to them after its head."""
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
