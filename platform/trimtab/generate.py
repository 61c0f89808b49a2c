"""Model inputs with a prefix for `model.generate` of transformers, without an engine.

base = base_model.resolve_base_model("smollm2-135m")
model, tokenizer = base.load(), base.tokenizer()
ids = model.generate(**build_inputs(model, base, [[{"role": "user", "content": "Hello"}]], prefix), max_new_tokens=40)
print(tokenizer.batch_decode(ids, skip_special_tokens=True))
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trimtab.artifacts.prefix import Prefix, check_base
from trimtab.model.base_model import BaseModel
from trimtab.model.chat_template import Message, build_renderer
from trimtab.model.frozen_model import FrozenModel
from trimtab.types import MAX_ROWS

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def build_inputs(
    model: "PreTrainedModel", base: BaseModel, conversations: Sequence[Sequence[Message]], prefix: Prefix | None = None
) -> dict[str, Tensor]:
    """Build the keyword arguments of `model.generate` for a batch of conversations.

    The prompt is passed as embeddings, so `generate` returns only the token ids of the answers.

    Args:
        model: loaded model of `base`.
        base: base model; it provides the tokenizer and the chat template.
        conversations: conversations that the assistant answers.
        prefix: prefix to insert into each prompt, or None.

    Returns:
        `inputs_embeds` [B, T, d] and `attention_mask` [B, T], left-padded.

    Raises:
        ArtifactError: if the prefix was made for another base model.
        UsageError: if a message contains the text of a slot token.
    """
    renderer = build_renderer(base, MAX_ROWS)
    if prefix is None:
        rows, prompts = [], [renderer.render_prompt(c) for c in conversations]
    else:
        check_base(prefix, base)
        rows = list(range(renderer.first_slot, renderer.first_slot + len(prefix.vectors)))
        prompts = [renderer.render_prompt(c, prefix.card.position, rows) for c in conversations]
    for ids in prompts:
        renderer.check_slots(ids, rows)
    frozen = FrozenModel(model, renderer.first_slot)
    longest = max(map(len, prompts))
    tokens = torch.tensor([[0] * (longest - len(ids)) + ids for ids in prompts], device=frozen.device)
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts], device=frozen.device)
    with torch.no_grad():
        embedded = frozen.embed_inputs(prefix.vectors.to(frozen.device) if prefix else None, tokens)
    return {"inputs_embeds": embedded, "attention_mask": mask}
