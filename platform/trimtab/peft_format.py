"""Import and export of prefixes as PEFT prompt-tuning adapters, without peft and without unpickling.

A PEFT adapter differs from a prefix in two ways. PEFT inserts its vectors before the whole prompt, which equals the position
`start` only if the prompt has no beginning-of-sequence token. PEFT inserts its vectors after any scaling of the embeddings,
trimtab before it.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from trimtab.artifacts.card import PrefixCard
from trimtab.artifacts.prefix import Prefix, build_prefix, check_base, read_single_tensor, save_prefix
from trimtab.cli.commands import ExportConfig, ImportConfig
from trimtab.cli.console import print_line
from trimtab.errors import ArtifactError, UsageError
from trimtab.loading import load_prefix
from trimtab.model.base_model import BaseModel, resolve_base_model
from trimtab.model.chat_template import build_renderer
from trimtab.types import MAX_ROWS
from trimtab.util.json_files import read_json_object

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
TENSOR = "prompt_embeddings"
# P-tuning saves the vectors that its encoder computes, in the same layout and for the same position.
READABLE_TYPES = ("PROMPT_TUNING", "P_TUNING")


def import_adapter(folder: Path, base: BaseModel, name: str) -> Prefix:
    """Convert a PEFT prompt-tuning or P-tuning adapter to a prefix at position `start`.

    An adapter does not record the weights that it was trained on, so that only its width is checked.

    Args:
        folder: folder of the adapter.
        base: base model of the adapter.
        name: name of the new prefix.

    Raises:
        ArtifactError: if the folder holds no adapter, the file is pickled, truncated or of another format, the adapter has
            another type or width, or a vector contains NaN or infinity.
        UsageError: if prompts of the base model begin with a beginning-of-sequence token.
    """
    folder = Path(folder)
    config = _config(folder)
    vectors = _vectors(folder)
    if vectors.shape[1] != base.width:
        raise ArtifactError(f"{folder} has width {vectors.shape[1]}; base model {base.name} has {base.width}")
    _check_start(base)
    source = {key: config.get(key) for key in ("peft_type", "base_model_name_or_path", "peft_version")}
    card = PrefixCard("prefix", name, base.name, base.fingerprint, "start", 0, 0, "", method=source)
    return build_prefix(vectors.float() / _scale(base), card)


def export_adapter(prefix: Prefix, folder: Path, base: BaseModel) -> Path:
    """Write a prefix at position `start` as an adapter that `peft.PeftModel.from_pretrained` loads.

    Args:
        prefix: prefix to export.
        folder: target folder, created on demand.
        base: base model of the prefix.

    Returns:
        The target folder.

    Raises:
        ArtifactError: if the prefix was made for another base model.
        UsageError: if PEFT would insert the vectors at another position.
    """
    check_base(prefix, base)
    card = prefix.card
    if card.position != "start":
        raise UsageError(f"prefix {card.name!r} has position {card.position}; PEFT knows only the start of the prompt")
    _check_start(base)
    config = {
        "peft_type": "PROMPT_TUNING",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base.path),
        "inference_mode": True,
        "num_virtual_tokens": card.num_virtual_tokens,
        "num_transformer_submodules": 1,
        "token_dim": card.width,
        "prompt_tuning_init": "RANDOM",
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({TENSOR: (prefix.vectors * _scale(base)).contiguous()}, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return folder


def run_import(config: ImportConfig) -> dict[str, Any]:
    """Run the `import` command: save an adapter as a prefix.

    Returns:
        The `folder` and `digest` of the prefix.
    """
    prefix = import_adapter(Path(config.adapter), resolve_base_model(config.base), config.name)
    folder = save_prefix(prefix, Path(config.out))
    print_line(
        f"{folder}: prefix {config.name} with {prefix.card.num_virtual_tokens} vectors, position start, for {prefix.card.base}"
    )
    return {"folder": str(folder), "digest": prefix.card.digest}


def run_export(config: ExportConfig) -> dict[str, Any]:
    """Run the `export` command: save a prefix as an adapter.

    Returns:
        The `folder` of the adapter.
    """
    base = resolve_base_model(config.base)
    prefix = load_prefix(config.prefix, base.name)
    folder = export_adapter(prefix, Path(config.out), base)
    if prefix.card.condition is not None:
        print_line(f"{folder} steers all prompts: an adapter has no condition ({prefix.card.condition.detector})")
    print_line(f"{folder}: for peft.PeftModel.from_pretrained(model, {str(folder)!r})")
    return {"folder": str(folder)}


def _config(folder: Path) -> dict[str, Any]:
    """Read the adapter's config; raise ArtifactError unless it is prompt tuning of a causal language model."""
    path = folder / CONFIG
    if not path.is_file():
        raise ArtifactError(f"{folder} has no {CONFIG}; a PEFT adapter is a folder with it and {WEIGHTS}")
    config = read_json_object(path, "the config of an adapter")
    kind, task = config.get("peft_type"), config.get("task_type")
    if kind not in READABLE_TYPES:
        raise ArtifactError(f"{path}: peft_type {kind!r} is not supported. Supported types: {', '.join(READABLE_TYPES)}")
    if task not in ("CAUSAL_LM", None):
        raise ArtifactError(f"{path}: task_type {task!r} is not a causal language model")
    return config


def _vectors(folder: Path) -> Tensor:
    """Read the adapter's vectors [k, d] unscaled; raise ArtifactError if the file holds anything else."""
    path = folder / WEIGHTS
    if not path.exists() and (folder / PICKLE).exists():
        raise ArtifactError(f"{folder / PICKLE} is a pickle, which can run code and is never read: save it as safetensors")
    vectors = read_single_tensor(path, TENSOR)
    if vectors.ndim != 2 or not vectors.is_floating_point():
        raise ArtifactError(f"{path}: {TENSOR} must be numbers [k, d], not {vectors.dtype} {list(vectors.shape)}")
    return vectors


def _check_start(base: BaseModel) -> None:
    """Raise UsageError if prompts begin with a BOS token: trimtab inserts rows after it, PEFT before it."""
    renderer = build_renderer(base, MAX_ROWS)
    ids = renderer.render_prompt([{"role": "user", "content": "x"}], "start", [renderer.first_slot])
    if ids[0] != renderer.first_slot:
        raise UsageError(f"prompts of {base.name} begin with a BOS token: PEFT puts vectors before it, trimtab after it")


def _scale(base: BaseModel) -> float:
    """Return the factor by which the embedding table scales its rows (1 in most families), without loading weights."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base.path))
    table = model.get_input_embeddings()
    scale = getattr(table, "scalar_embed_scale", getattr(table, "embed_scale", 1.0))
    if not isinstance(scale, int | float):
        raise UsageError(f"base model {base.name} scales its embeddings in a way that trimtab does not support")
    return float(scale)
