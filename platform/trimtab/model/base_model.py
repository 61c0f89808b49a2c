"""Base model: resolution by catalog name, folder or hub id, and identification by fingerprint."""

import hashlib
import json
import logging
import struct
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass
from functools import lru_cache
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from filelock import FileLock

from trimtab import settings
from trimtab.assets.catalog import Asset, HubSource, load_catalog
from trimtab.assets.download import fetch_asset, fetch_from_hub
from trimtab.errors import AssetError, NotFoundError, UsageError
from trimtab.types import DType

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def get_dtype(precision: DType) -> torch.dtype:
    """Return the torch dtype of a precision.

    `auto` is bf16 if this machine computes in bf16 natively, else float32: a CPU without bf16 instructions is several times
    slower in bf16 than in float32.
    """
    if precision == "auto":
        native = (
            torch.cuda.is_available()
            or torch.cpu._is_avx512_bf16_supported()  # pyright: ignore[reportPrivateUsage]
            or torch.cpu._is_amx_tile_supported()  # pyright: ignore[reportPrivateUsage]
        )
        return torch.bfloat16 if native else torch.float32
    return torch.bfloat16 if precision == "bf16" else torch.float32


def resolve_dtype(precision: DType) -> Literal["bf16", "fp32"]:
    """Return the precision that `auto` stands for on this machine; other values are returned unchanged."""
    return "bf16" if get_dtype(precision) == torch.bfloat16 else "fp32"


# Config fields that depend on the library that wrote the file, not on the model.
VOLATILE = {"transformers_version", "torch_dtype", "dtype", "_name_or_path", "architectures_version"}
SAMPLE = 4096


@dataclass(frozen=True)
class BaseModel:
    """Base model on this machine.

    Attributes:
        name: display name.
        path: folder of config, tokenizer and safetensors.
        fingerprint: 16 hex digits over everything that a learned part depends on.
        width: embedding width d.
        vocabulary: number of embedding rows.
        depth: number of layers.
    """

    name: str
    path: Path
    fingerprint: str
    width: int
    vocabulary: int
    depth: int

    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """Load the tokenizer with its chat template."""
        return _import_auto_classes().AutoTokenizer.from_pretrained(self.path)

    def load(self, precision: DType = "auto", device: str | torch.device = "cpu") -> "PreTrainedModel":
        """Load the model, frozen and in evaluation mode.

        Args:
            precision: precision of the weights.
            device: device of the weights.
        """
        model: PreTrainedModel = _import_auto_classes().AutoModelForCausalLM.from_pretrained(
            self.path, dtype=get_dtype(precision)
        )
        model.requires_grad_(False)
        return model.eval().to(device)  # pyright: ignore[reportArgumentType]


def _import_auto_classes() -> Any:
    # Imported lazily: the import loads the generation code, half of the start-up time of a process that only names a model.
    from transformers.models import auto

    return auto


def resolve_base_model(name: str, revision: str | None = None) -> BaseModel:
    """Resolve a base model.

    Args:
        name: catalog name, folder, or hub id, optionally as `id@revision`.
        revision: revision of the hub id.

    Raises:
        NotFoundError: if no such model exists.
        UsageError: if the folder does not hold a model with config and safetensors.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _inspect_folder(folder.resolve().name, folder.resolve())
    entries = load_catalog()
    if name in entries and entries[name].member.endswith(".gguf"):
        return _inspect_folder(name, _convert_gguf(entries[name]))
    if name in entries and not entries[name].member:
        return _inspect_folder(name, fetch_asset(name))
    if name.count("/") != 1:
        models = [n for n, a in entries.items() if a.member.endswith(".gguf") or not a.member]
        raise NotFoundError(
            f"no base model {name!r}: give a folder, a hub id like org/model, or a catalog name ({', '.join(models)})"
        )
    hub_id, _, pinned = name.partition("@")
    try:
        path = fetch_from_hub(HubSource(hub_id, revision or pinned or "main"))
    except AssetError as error:
        raise NotFoundError(
            f"the hub has no model {name!r} that this machine can read ({type(error.__cause__).__name__})"
        ) from error
    return _inspect_folder(hub_id.split("/")[1].lower(), path)


def resolve_on_node(base: BaseModel) -> BaseModel:
    """Resolve a base model of another machine on this machine; it is looked up by name if its folder does not exist here.

    Raises:
        UsageError: if the model of that name on this machine has another fingerprint.
    """
    if base.path.exists():
        return base
    local = resolve_base_model(base.name)
    if local.fingerprint != base.fingerprint:
        raise UsageError(
            f"base model {base.name} has fingerprint {local.fingerprint} on this node; {base.fingerprint} is required"
        )
    return local


def compute_fingerprint(folder: Path) -> str:
    """Compute the base model fingerprint: 16 hex digits over config, weights, tokenizer and chat template.

    Weights contribute the name, dtype and shape of each tensor, and its first and last 4 KiB. This distinguishes a fine-tuned
    model from its parent, and takes milliseconds for a model of any size.
    """
    digest = hashlib.sha256()
    config = json.loads((folder / "config.json").read_text())
    digest.update(json.dumps({k: v for k, v in config.items() if k not in VOLATILE}, sort_keys=True).encode())
    for shard in sorted(folder.glob("*.safetensors")):
        _digest_weights(digest.update, shard)
    for name in ("tokenizer.json", "tokenizer.model", "chat_template.jinja"):
        if (folder / name).exists():
            digest.update(name.encode() + (folder / name).read_bytes())
    tokenizer_config = folder / "tokenizer_config.json"
    if tokenizer_config.exists():
        digest.update(str(json.loads(tokenizer_config.read_text()).get("chat_template")).encode())
    return digest.hexdigest()[:16]


def _digest_weights(update: Callable[[bytes], None], shard: Path) -> None:
    with shard.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header: dict[str, Any] = json.loads(file.read(length))
        for name in sorted(header):
            if name == "__metadata__":
                continue
            entry = header[name]
            begin, end = entry["data_offsets"]
            update(f"{name}{entry['dtype']}{entry['shape']}".encode())
            for offset in (begin, max(begin, end - SAMPLE)):
                file.seek(8 + length + offset)
                update(file.read(min(SAMPLE, end - begin)))


@lru_cache(maxsize=8)
def _inspect_folder(name: str, folder: Path) -> BaseModel:
    if not (folder / "config.json").exists() or not any(folder.glob("*.safetensors")):
        raise UsageError(f"{folder} is not a base model: it needs config.json and *.safetensors")
    return BaseModel(name, folder, compute_fingerprint(folder), *_read_sizes(folder))


def _read_sizes(folder: Path) -> tuple[int, int, int]:
    """Read width, vocabulary and depth from config.json, or from transformers' defaults, whose import takes seconds."""
    config = json.loads((folder / "config.json").read_text())
    sizes = config.get("text_config") or config
    if all(type(sizes.get(name)) is int for name in ("hidden_size", "vocab_size", "num_hidden_layers")):
        return sizes["hidden_size"], sizes["vocab_size"], sizes["num_hidden_layers"]
    text = _import_auto_classes().AutoConfig.from_pretrained(folder).get_text_config()
    return int(text.hidden_size), int(text.vocab_size), int(text.num_hidden_layers)


def _convert_gguf(asset: Asset) -> Path:
    """Return the folder of a catalog model as safetensors in bf16, converted from GGUF on first use."""
    target = settings.get_home() / "models" / f"{asset.name}-{asset.sha256[:8]}"
    if (target / "config.json").exists():
        return target
    source = fetch_asset(asset.name)
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not (target / "config.json").exists():
            partial = target.with_name(target.name + ".part")
            _save_as_safetensors(source, partial)
            partial.rename(target)
    return target


def _save_as_safetensors(source: Path, folder: Path) -> None:
    """Save a GGUF file as a model folder, without the progress bars and warnings of transformers: none needs an action."""
    # The import creates a log handler, which must not write into the buffer below.
    auto, logger = _import_auto_classes(), logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stderr(StringIO()):
            loaded = auto.AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.bfloat16)
            # transformers cannot save a model loaded from GGUF while it is marked as quantized.
            loaded.hf_quantizer = None  # pyright: ignore[reportArgumentType]
            if hasattr(loaded.config, "quantization_config"):
                del loaded.config.quantization_config  # pyright: ignore[reportAttributeAccessIssue]
            loaded.save_pretrained(folder)
            auto.AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(folder)
    finally:
        logger.setLevel(level)
