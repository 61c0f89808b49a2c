"""Prefixes from and for PEFT: a prompt-tuning adapter is the same vectors under other names. Needs no peft, unpickles nothing.

PEFT puts its vectors before the whole prompt, which is the place `start` as long as no beginning-of-sequence token comes
first; and it puts them in after any scaling of embeddings, where ours are from before it.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from trimtab.artifacts.card import PrefixCard, read_json_object
from trimtab.artifacts.prefix import Prefix, build_prefix, check_base, read_single_tensor, save_prefix
from trimtab.cli.commands import ExportConfig, ImportConfig
from trimtab.cli.console import print_line
from trimtab.errors import ArtifactError, UsageError
from trimtab.loading import load_prefix
from trimtab.model.base_model import BaseModel, resolve_base_model
from trimtab.model.chat_template import build_renderer
from trimtab.types import MAX_ROWS

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
TENSOR = "prompt_embeddings"


def import_adapter(folder: Path, base: BaseModel, name: str) -> Prefix:
    """The prefix `name`, of place `start`, from a PEFT prompt-tuning adapter of this base model.

    An adapter does not say what weights it was made for: only its width is checked. Raises ArtifactError: no adapter, a
    pickled, truncated or foreign file, another kind of adapter or width, NaN or infinity; UsageError where PEFT's place is
    none of ours.
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
    """Write a prefix of place `start` as an adapter that `peft.PeftModel.from_pretrained` loads; gives the folder back.

    Raises ArtifactError for a prefix of another base model, UsageError where PEFT would put it elsewhere.
    """
    check_base(prefix, base)
    card = prefix.card
    if card.place != "start":
        raise UsageError(f"prefix {card.name!r} goes to place {card.place}; PEFT knows only the start of the prompt")
    _check_start(base)
    config = {
        "peft_type": "PROMPT_TUNING",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base.path),
        "inference_mode": True,
        "num_virtual_tokens": card.rows,
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
    """Save an adapter as a prefix."""
    prefix = import_adapter(Path(config.adapter), resolve_base_model(config.base), config.name)
    folder = save_prefix(prefix, Path(config.out))
    print_line(f"{folder}: prefix {config.name} with {prefix.card.rows} rows, place start, for {prefix.card.base}")
    return {"folder": str(folder), "digest": prefix.card.digest}


def run_export(config: ExportConfig) -> dict[str, Any]:
    """Save a prefix as an adapter."""
    base = resolve_base_model(config.base)
    folder = export_adapter(load_prefix(config.prefix, base.name), Path(config.out), base)
    print_line(f"{folder}: for peft.PeftModel.from_pretrained(model, {str(folder)!r})")
    return {"folder": str(folder)}


def _config(folder: Path) -> dict[str, Any]:
    """The adapter's config; ArtifactError unless it is prompt tuning of a causal language model."""
    path = folder / CONFIG
    if not path.is_file():
        raise ArtifactError(f"{folder} has no {CONFIG}; a PEFT adapter is a folder with it and {WEIGHTS}")
    config = read_json_object(path, "the config of an adapter")
    kind, task = config.get("peft_type"), config.get("task_type")
    if kind != "PROMPT_TUNING":
        raise ArtifactError(f"{path}: peft_type {kind!r} is no prefix; only PROMPT_TUNING is")
    if task not in ("CAUSAL_LM", None):
        raise ArtifactError(f"{path}: task_type {task!r} is not of a causal language model")
    return config


def _vectors(folder: Path) -> Tensor:
    """The adapter's vectors [k, d] as they are; ArtifactError for any file that is not just those."""
    path = folder / WEIGHTS
    if not path.exists() and (folder / PICKLE).exists():
        raise ArtifactError(f"{folder / PICKLE} is a pickle, which can run code and is never read: save it as safetensors")
    vectors = read_single_tensor(path, TENSOR)
    if vectors.ndim != 2 or not vectors.is_floating_point():
        raise ArtifactError(f"{path}: {TENSOR} must be numbers [k, d], not {vectors.dtype} {list(vectors.shape)}")
    return vectors


def _check_start(base: BaseModel) -> None:
    """UsageError where a beginning-of-sequence token comes first: our vectors go after it, PEFT's before."""
    renderer = build_renderer(base, MAX_ROWS)
    ids = renderer.render_prompt([{"role": "user", "content": "x"}], "start", [renderer.first_row])
    if ids[0] != renderer.first_row:
        raise UsageError(f"prompts of {base.name} begin with a BOS token: PEFT puts vectors before it, trimtab after it")


def _scale(base: BaseModel) -> float:
    """What the embedding table multiplies its rows with (1 in most families); the model is built without its weights."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base.path))
    table = model.get_input_embeddings()
    scale = getattr(table, "scalar_embed_scale", getattr(table, "embed_scale", 1.0))
    if not isinstance(scale, int | float):
        raise UsageError(f"base model {base.name} scales its embeddings in a way that trimtab does not know")
    return float(scale)
