"""Tiny random checkpoints of common model families, each with a trained tokenizer and a chat template like its family's."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from trimtab.model.base_model import BaseModel, resolve_base_model

TEXTS = [
    "What is the capital of France? It is Paris, a city on the river Seine.",
    "How do I boil an egg? Put it into hot water and wait for some minutes.",
    "You are a helpful assistant. Be brief and kind, and think before you answer.",
    "I cannot help with that. The user asks for something, so let me think about it first.",
]
WIDTH = 64
SIZES = {
    "hidden_size": WIDTH,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    # Large enough that logits differ and that logit softcapping changes them.
    "initializer_range": 0.3,
}

LLAMA = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN2 = "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}" + CHATML
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] "
    "{% if loop.index0 == 1 and messages[0].role == 'system' %}{{ messages[0].content }}\n\n{% endif %}{{ m.content }}[/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)
PHI = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
NO_SYSTEM = (
    "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """Model family. `tokens` are the special tokens, beginning and end of sequence first; `turn` ends an answer; `spare` is
    the number of embedding rows without a token, as in many real checkpoints."""

    model_type: str
    template: str
    tokens: tuple[str, ...]
    turn: str
    tied: bool
    spare: int = 0
    options: dict[str, Any] = field(default_factory=dict[str, Any])


IM = ("<|endoftext|>", "<|im_end|>", "<|im_start|>")
TURNS = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8, "query_pre_attn_scalar": 32}
FAMILIES = {
    "llama": Family(
        "llama",
        LLAMA,
        ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
        "<|eot_id|>",
        False,
    ),
    "qwen2": Family("qwen2", QWEN2, IM, "<|im_end|>", True, spare=20),
    "qwen3": Family("qwen3", CHATML, IM, "<|im_end|>", False, spare=20),
    "gemma2": Family("gemma2", GEMMA, TURNS, "<end_of_turn>", True, options={**SLIDING, "final_logit_softcapping": 5.0}),
    "gemma3": Family("gemma3_text", GEMMA, TURNS, "<end_of_turn>", True, options=SLIDING),
    "mistral": Family("mistral", MISTRAL, ("<s>", "</s>", "[INST]", "[/INST]"), "</s>", False),
    "phi3": Family(
        "phi3", PHI, ("<s>", "<|endoftext|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"), "<|end|>", False
    ),
    "granite": Family("granite", CHATML, IM, "<|im_end|>", True, options={"embedding_multiplier": 12.0, "logits_scaling": 8.0}),
    "cohere": Family("cohere", CHATML, IM, "<|im_end|>", True, options={"logit_scale": 0.25}),
}


def make_base_model(family: Family, folder: Path) -> BaseModel:
    """Write a random checkpoint into a folder and return its base model. The same family gives the same checkpoint."""
    tokenizer = _train_tokenizer(family)
    ids = tokenizer.convert_tokens_to_ids
    config = AutoConfig.for_model(
        family.model_type,
        **SIZES | family.options,
        vocab_size=len(tokenizer) + family.spare,
        tie_word_embeddings=family.tied,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            # Without it Gemma's scaled embeddings outweigh the output of its layers, and logits hardly depend on the prompt.
            if "post_" in name:
                weight += 6 * torch.rand_like(weight)
    model.generation_config.eos_token_id = sorted({tokenizer.eos_token_id, ids(family.turn)})
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return resolve_base_model(str(folder))


def _train_tokenizer(family: Family) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=list(family.tokens), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=family.tokens[0],
        eos_token=family.tokens[1],
        additional_special_tokens=list(family.tokens[2:]),
    )
    wrapped.chat_template = family.template
    return wrapped
