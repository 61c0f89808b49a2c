"""Frozen model with prefix vectors in the place of slot tokens, tokenized samples and micro-batches.

Micro-batches are formed independently of the number of workers, and their gradients are added in a fixed order. A run therefore
yields the same prefix with any number of workers and after any number of restarts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from trimtab.data.prompt import Prompt, add_system_prompt
from trimtab.errors import UsageError
from trimtab.model.chat_template import ChatRenderer
from trimtab.model.chunked_logprobs import TopLogprobs, compute_divergences, compute_token_logprobs, compute_top_logprobs
from trimtab.model.prefix_tree import build_prefix_tree, compute_states, disable_tree_attention, enable_tree_attention
from trimtab.types import Position

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class TokenizedSample:
    """Prompt and answer as token ids.

    Attributes:
        ids: token ids with the slot tokens of the prefix.
        plain: token ids without the slot tokens, and with the system prompt of the teacher if there is one.
        targets: number of answer tokens, which come last.
    """

    ids: tuple[int, ...]
    plain: tuple[int, ...]
    targets: int


@dataclass(frozen=True)
class TrainingExample:
    """Training example of an objective.

    Attributes:
        chosen: sample with the target answer.
        label: class of the prompt.
        weight: weight a_c of the class, above 0.
        rejected: sample with the rejected answer, or None if the objective needs none.
        corrected: whether the target differs in kind from the frozen model's own answer.
    """

    chosen: TokenizedSample
    label: str
    weight: float = 1.0
    rejected: TokenizedSample | None = None
    corrected: bool = False


def tokenize_sample(
    renderer: ChatRenderer,
    prompt: Prompt,
    answer: str,
    position: Position,
    rows: int,
    longest: int,
    teacher_system: str | None = None,
) -> TokenizedSample:
    """Tokenize a prompt with an answer.

    Args:
        renderer: chat renderer of the base model.
        prompt: prompt of the sample.
        answer: answer text.
        position: position of the prefix.
        rows: number of rows of the prefix.
        longest: maximum number of answer tokens; the rest is cut off.
        teacher_system: system prompt of the teacher, before that of the prompt; None without a teacher.
    """
    messages = [*prompt.messages, {"role": "assistant", "content": answer}]
    ids, spans = renderer.render_conversation(messages, position, range(renderer.first_slot, renderer.first_slot + rows))
    span = spans[-1][:longest]
    reference = prompt.messages if teacher_system is None else add_system_prompt(prompt, teacher_system).messages
    plain = (*renderer.render_prompt(reference), *ids[span.start : span.stop])
    return TokenizedSample(tuple(ids[: span.stop]), plain, len(span))


def split_into_micro_batches(examples: Sequence[TrainingExample], size: int) -> list[list[TrainingExample]]:
    """Split a batch into micro-batches of similar lengths, the longest first.

    The result does not depend on the number of workers.

    Args:
        examples: examples of the batch.
        size: maximum number of examples of a micro-batch.
    """
    ordered = sorted(examples, key=lambda e: (-len(e.chosen.ids), e.chosen.ids))
    return [ordered[i : i + size] for i in range(0, len(ordered), size)]


def select_worker_share(batches: Sequence[list[TrainingExample]], rank: int, workers: int) -> list[int]:
    """Return the indices of the micro-batches that one worker computes.

    Each micro-batch goes to the worker with the fewest tokens so far.

    Args:
        batches: micro-batches of a batch.
        rank: rank of the worker.
        workers: number of workers.
    """
    loads = [0] * workers
    share: list[int] = []
    for index, batch in enumerate(batches):
        least = loads.index(min(loads))
        loads[least] += len(batch[0].chosen.ids) * len(batch)
        if least == rank:
            share.append(index)
    return share


class FrozenModel:
    """Frozen causal language model that accepts prefix vectors in the place of slot tokens."""

    def __init__(self, model: "PreTrainedModel", first_slot: int) -> None:
        self.model = model
        self.first_slot = first_slot
        # transformers types embedding tables and heads as generic modules.
        self.embedding = cast(nn.Embedding, model.get_input_embeddings())
        # Models that scale their embeddings do so inside the table, and the serving engine scales rows as well.
        self.scale = getattr(self.embedding, "embed_scale", 1.0)
        self.device = self.embedding.weight.device
        self.dtype = self.embedding.weight.dtype
        self.packs = False

    def target_logits(self, vectors: Tensor | None, ids: Sequence[Sequence[int]], targets: Sequence[int]) -> Tensor:
        """Compute the logits that predict the last `targets[i]` tokens of each sequence.

        Args:
            vectors: vectors of the prefix [k, d], or None.
            ids: token ids of each sequence, with slot tokens.
            targets: number of target tokens of each sequence.

        Returns:
            Logits [sum(targets), V], float32.
        """
        return self.head(self.target_states(vectors, ids, targets))

    def target_states(self, vectors: Tensor | None, ids: Sequence[Sequence[int]], targets: Sequence[int]) -> Tensor:
        """Compute the last hidden states that predict the last `targets[i]` tokens of each sequence.

        The head runs later on these states only. For a large vocabulary, running it on all tokens would cost more than the
        decoder.

        Args:
            vectors: vectors of the prefix [k, d], or None.
            ids: token ids of each sequence, with slot tokens.
            targets: number of target tokens of each sequence.

        Returns:
            Hidden states [sum(targets), d].
        """
        ends = [(len(row) - n - 1, len(row) - 1) for row, n in zip(ids, targets, strict=True)]
        if self.packs:
            tree = build_prefix_tree(ids, self.device)
            hidden = compute_states(self.model, self.embed_inputs(vectors, tree.ids), tree)
            return hidden[torch.cat([tree.paths[i, begin:end] for i, (begin, end) in enumerate(ends)])]
        longest = max(map(len, ids))
        tokens = torch.tensor([[*row, *[0] * (longest - len(row))] for row in ids], device=self.device)
        lengths = torch.tensor([len(row) for row in ids], device=self.device)
        attention = torch.arange(longest, device=self.device)[None] < lengths[:, None]
        hidden = self.model.get_decoder()(
            inputs_embeds=self.embed_inputs(vectors, tokens), attention_mask=attention.long(), use_cache=False
        ).last_hidden_state
        return torch.cat([hidden[i, begin:end] for i, (begin, end) in enumerate(ends)])

    def compute_logprobs(self, states: Tensor, tokens: Sequence[int]) -> Tensor:
        """Compute the log-probability of each token.

        Args:
            states: last hidden states [N, d] that predict the tokens.
            tokens: N token ids.

        Returns:
            Log-probabilities [N], in nats.
        """
        return compute_token_logprobs(self.head, states, torch.tensor(tokens, device=self.device), self.vocabulary)

    def compute_top_logprobs(self, states: Tensor, count: int) -> TopLogprobs:
        """Compute the `count` most likely tokens after each hidden state [N, d], without gradients."""
        return compute_top_logprobs(self.head, states, self.vocabulary, min(count, self.vocabulary - 1))

    def compute_divergences(self, states: Tensor, teacher: TopLogprobs) -> Tensor:
        """Compute KL(teacher || p(. | state)) [N] after each hidden state [N, d], in nats."""
        return compute_divergences(self.head, states, teacher, self.vocabulary)

    @property
    def vocabulary(self) -> int:
        """Size of the model's vocabulary."""
        return int(self.model.config.get_text_config().vocab_size)

    def embed_inputs(self, vectors: Tensor | None, tokens: Tensor) -> Tensor:
        """Embed token ids, with prefix vectors in the place of slot tokens.

        Args:
            vectors: vectors of the prefix [k, d], or None.
            tokens: token ids [...].

        Returns:
            Embeddings [..., d].
        """
        is_row = tokens >= self.first_slot
        embedded = self.embedding(tokens.masked_fill(is_row, 0))
        if vectors is None:
            return embedded
        values = embedding(tokens.sub(self.first_slot).clamp(min=0), vectors * self.scale)
        return torch.where(is_row[..., None], values.to(self.dtype), embedded)

    def enable_prefix_tree(self) -> bool:
        """Compute the shared beginnings of sequences once in all later calls, which is faster.

        A small test batch verifies that the model supports this.

        Returns:
            False if the model does not support it; the model is then unchanged.
        """
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
        """Raise UsageError unless the decoder followed by `head` reproduces the model's logits.

        Some families scale or cap their logits in a way that `head` does not implement.
        """
        ids = torch.arange(5, 13, device=self.device)[None]
        with torch.no_grad():
            expected = self.model(input_ids=ids, use_cache=False).logits[0, -4:].float()
            actual = self.target_logits(None, ids.tolist(), [3])
        if not torch.allclose(expected[:3], actual, atol=0.05, rtol=0.05):
            raise UsageError(f"{type(self.model).__name__} computes its logits in a way that trimtab does not support")

    def head(self, hidden: Tensor) -> Tensor:
        """Compute the logits of hidden states, including the scaling and soft-capping that some families apply after the head.

        Args:
            hidden: last hidden states [N, d].

        Returns:
            Logits [N, V], float32.
        """
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
