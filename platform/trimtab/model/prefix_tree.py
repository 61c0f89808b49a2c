"""Rows that begin alike, computed as one: what a batch's rows share at their start goes through the model once.

A prefix comes before a prompt, so rows that are trained together begin with the same vectors, chat template and often system
prompt. Their tokens make up a tree; it is laid out as one row without padding, of which each token keeps the position that it
has in its own row. Only attention looks at rows one by one. States and gradients are those of the padded batch (ours).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import embedding, scaled_dot_product_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What transformers calls its usual implementation of attention, and what it is to call ours.
PADDED, PACKED = "sdpa", "trimtab_packed"
# Layers whose tokens see each other through attention alone, all of their row or its last part.
KINDS = {"full_attention", "sliding_attention"}


@dataclass(frozen=True)
class PrefixTree:
    """A batch as one row of L tokens: `ids` [L], `positions` [L] that they have in their rows, `paths` [B, T] where each row's
    tokens are (0 beyond its end), and `owners` [L] one place in B x T for each of them."""

    ids: Tensor
    positions: Tensor
    paths: Tensor
    owners: Tensor


def build_prefix_tree(rows: Sequence[Sequence[int]], device: torch.device) -> PrefixTree:
    """Lay out rows of token ids; tokens with the same ids before them are one."""
    width = max(map(len, rows))
    known: dict[tuple[int, int], int] = {}
    ids, positions, owners, paths = list[int](), list[int](), list[int](), list[list[int]]()
    for number, row in enumerate(rows):
        path, before = list[int](), -1
        for position, token in enumerate(row):
            # As all before it is in `before`, a token and that say which token of the tree it is.
            before = known.setdefault((before, token), len(ids))
            if before == len(ids):
                ids.append(token)
                positions.append(position)
                owners.append(number * width + position)
            path.append(before)
        paths.append([*path, *[0] * (width - len(row))])
    return PrefixTree(*(torch.tensor(values, device=device) for values in (ids, positions, paths, owners)))


def enable_tree_attention(model: "PreTrainedModel") -> bool:
    """Have the model's attention look at rows one by one, after which it takes packed batches only; False, and nothing
    changed, where its family does not allow it."""
    # Not on top: it brings all models along, and a driver only names what workers do.
    from transformers import AttentionInterface

    if _implementation(model) != PADDED:
        return False
    if not set(getattr(model.config.get_text_config(), "layer_types", None) or ()) <= KINDS:
        return False
    AttentionInterface.register(PACKED, compute_tree_attention)
    model.set_attn_implementation(PACKED)
    return _implementation(model) == PACKED


def disable_tree_attention(model: "PreTrainedModel") -> None:
    """Have it take padded batches again."""
    model.set_attn_implementation(PADDED)


def compute_states(model: "PreTrainedModel", embedded: Tensor, packed: PrefixTree) -> Tensor:
    """Last hidden states [L, d] of a packed batch, from its embeddings [L, d]."""
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
    """Causal attention of queries [1, H, L, D] to keys and values [1, G, L, D] within each row; [1, L, H, D].

    Registered with transformers, which hands `rows` through the layers as it is given to the decoder.
    """
    if rows is None:
        raise TypeError(f"{type(module).__name__} does not get what its model is given")
    paths, owners = rows
    q, k, v = (_spread(tensor, paths) for tensor in (query, key, value))
    width, mask = paths.shape[1], None
    if sliding_window is not None and sliding_window < width:
        at = torch.arange(width, device=query.device)
        apart = at[:, None] - at[None]
        mask = ((apart >= 0) & (apart < sliding_window))[None, None]
    grouped = query.shape[1] != key.shape[1]
    seen = scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scaling, enable_gqa=grouped)
    out = seen.transpose(1, 2).flatten(0, 1)
    return embedding(owners, out.flatten(1)).unflatten(1, out.shape[1:])[None], None


def _implementation(model: "PreTrainedModel") -> str:
    return str(getattr(model.config.get_text_config(), "_attn_implementation", ""))


def _spread(tensor: Tensor, paths: Tensor) -> Tensor:
    """Rows [B, H, T, D] of a packed batch [1, H, L, D].

    By way of `embedding`, whose gradient is the same each time, on a GPU too, and on a CPU fast.
    """
    table = tensor[0].transpose(0, 1)
    return embedding(paths, table.flatten(1)).unflatten(2, table.shape[1:]).transpose(1, 2)
