"""Prefix-tree batches: tokens that the rows of a batch share at their start are computed once.

A prefix precedes the prompt, so that the sequences of a training batch begin with the same vectors, chat template and often the
same system prompt. Their tokens form a tree. It is laid out as one sequence without padding, in which each token keeps the
position of its own sequence. Only attention works on separate sequences. States and gradients equal those of the padded batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import embedding, scaled_dot_product_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Names in transformers of its default attention implementation and of the one registered here.
PADDED, PACKED = "sdpa", "trimtab_packed"
# Supported layer types: tokens interact through full or sliding-window attention only.
KINDS = {"full_attention", "sliding_attention"}


@dataclass(frozen=True)
class PrefixTree:
    """Batch of B sequences as one sequence of L distinct tokens.

    Attributes:
        ids: token ids [L].
        positions: positions [L] of the tokens in their sequences.
        paths: indices into the L tokens for each sequence [B, T], 0 beyond its end.
        owners: one index [L] into the flattened B x T grid for each token.
    """

    ids: Tensor
    positions: Tensor
    paths: Tensor
    owners: Tensor


def build_prefix_tree(rows: Sequence[Sequence[int]], device: torch.device) -> PrefixTree:
    """Build the prefix tree of a batch; tokens with identical preceding ids are merged.

    Args:
        rows: token ids of each sequence.
        device: device of the result.
    """
    width = max(map(len, rows))
    nodes: dict[tuple[int, int], int] = {}
    ids, positions, owners, paths = list[int](), list[int](), list[int](), list[list[int]]()
    for number, row in enumerate(rows):
        path, before = list[int](), -1
        for position, token in enumerate(row):
            # `before` identifies all preceding tokens, so that the pair identifies the node of the tree.
            before = nodes.setdefault((before, token), len(ids))
            if before == len(ids):
                ids.append(token)
                positions.append(position)
                owners.append(number * width + position)
            path.append(before)
        paths.append([*path, *[0] * (width - len(row))])
    return PrefixTree(*(torch.tensor(values, device=device) for values in (ids, positions, paths, owners)))


def enable_tree_attention(model: "PreTrainedModel") -> bool:
    """Switch the model's attention to prefix-tree batches; the model then accepts no padded batches.

    Returns:
        False if the model family does not support it; the model is then unchanged.
    """
    # Imported lazily: the import loads all model classes, which a driver does not need.
    from transformers import AttentionInterface

    if _implementation(model) != PADDED:
        return False
    if not set(getattr(model.config.get_text_config(), "layer_types", None) or ()) <= KINDS:
        return False
    AttentionInterface.register(PACKED, compute_tree_attention)
    model.set_attn_implementation(PACKED)
    return _implementation(model) == PACKED


def disable_tree_attention(model: "PreTrainedModel") -> None:
    """Switch the model's attention back to padded batches."""
    model.set_attn_implementation(PADDED)


def compute_states(model: "PreTrainedModel", embedded: Tensor, packed: PrefixTree) -> Tensor:
    """Compute the last hidden states of a prefix-tree batch.

    Args:
        model: model with tree attention enabled.
        embedded: embeddings [L, d].
        packed: prefix tree of the batch.

    Returns:
        Hidden states [L, d].
    """
    hidden = model.get_decoder()(
        inputs_embeds=embedded[None],
        position_ids=packed.positions[None],
        rows=(packed.paths, packed.owners),
        use_cache=False,
    ).last_hidden_state
    return hidden[0]


def compute_tree_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    rows: tuple[Tensor, Tensor] | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Compute causal attention within each sequence of a prefix-tree batch.

    The function is registered with transformers, which passes `rows` from the decoder's arguments through its layers.

    Args:
        module: attention module.
        query: queries [1, H, L, D].
        key: keys [1, G, L, D].
        value: values [1, G, L, D].
        attention_mask: not used; the mask follows from `rows`.
        rows: `paths` and `owners` of the prefix tree.
        scaling: factor of the attention scores, or None for the default.
        sliding_window: number of tokens that a query attends to, or None for all.

    Returns:
        Outputs [1, L, H, D], and None for the attention weights.
    """
    if rows is None:
        raise TypeError(f"{type(module).__name__} does not receive the keyword arguments of its model")
    paths, owners = rows
    q, k, v = (_spread(tensor, paths) for tensor in (query, key, value))
    width, mask = paths.shape[1], None
    if sliding_window is not None and sliding_window < width:
        index = torch.arange(width, device=query.device)
        distance = index[:, None] - index[None]
        mask = ((distance >= 0) & (distance < sliding_window))[None, None]
    grouped = query.shape[1] != key.shape[1]
    attended = scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scaling, enable_gqa=grouped)
    out = attended.transpose(1, 2).flatten(0, 1)
    return embedding(owners, out.flatten(1)).unflatten(1, out.shape[1:])[None], None


def _implementation(model: "PreTrainedModel") -> str:
    return str(getattr(model.config.get_text_config(), "_attn_implementation", ""))


def _spread(tensor: Tensor, paths: Tensor) -> Tensor:
    """Expand a tree tensor [1, H, L, D] to the sequences of the batch [B, H, T, D].

    `embedding` is used because its gradient is deterministic, on a GPU too, and fast on a CPU.
    """
    table = tensor[0].transpose(0, 1)
    return embedding(paths, table.flatten(1)).unflatten(2, table.shape[1:]).transpose(1, 2)
