"""The card: the JSON beside every artifact that says what it is, what it was made for, and from what."""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from trimtab.errors import ArtifactError
from trimtab.types import POSITIONS, Position
from trimtab.util.atomic_files import write_atomic

CARD_VERSION = 1
FILE = "card.json"
MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class PrefixCard:
    """What an artifact is.

    `base` and `fingerprint` name the frozen model it was made for; `place` is where in the prompt a prefix goes; `rows` and
    `width` the shape [k, d] of its vectors; `digest` the SHA-256 of their float32 bytes; `method` the objective and its whole
    config; `data` one entry {name, digest, rows} per input; `metrics` what it reached; `run_id` the MLflow run.
    """

    kind: Literal["prefix"]
    name: str
    base: str
    fingerprint: str
    place: Position
    rows: int
    width: int
    digest: str
    method: dict[str, Any] = field(default_factory=dict[str, Any])
    data: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    metrics: dict[str, float] = field(default_factory=dict[str, float])
    run_id: str | None = None
    card_version: int = CARD_VERSION


def write_card(card: PrefixCard, folder: Path) -> None:
    """Write the card into an artifact's folder, which is whole then: the card is the last that is written."""
    write_atomic(folder / FILE, json.dumps(asdict(card), indent=2, sort_keys=True) + "\n")


def read_card(folder: Path) -> PrefixCard:
    """Read the card of an artifact's folder; ArtifactError where it is missing, damaged or of an unknown version."""
    path = folder / FILE
    if not path.exists():
        raise ArtifactError(f"{folder} has no {FILE}; an artifact is a folder with a card and a safetensors file")
    raw = read_json_object(path, "a card")
    if raw.get("card_version") != CARD_VERSION:
        raise ArtifactError(
            f"{path} has card version {raw.get('card_version')!r}; this trimtab reads {CARD_VERSION}: update trimtab"
        )
    known = {f.name for f in fields(PrefixCard)}
    missing = {"kind", "name", "base", "fingerprint", "place", "rows", "width", "digest"} - raw.keys()
    if missing or raw.keys() - known:
        raise ArtifactError(f"{path}: missing fields {sorted(missing)}, unknown fields {sorted(raw.keys() - known)}")
    if raw["kind"] != "prefix" or raw["place"] not in POSITIONS:
        raise ArtifactError(f"{path}: kind {raw['kind']!r} at place {raw['place']!r} is not known here")
    if not all(type(raw[n]) is int for n in ("rows", "width")):
        raise ArtifactError(f"{path}: rows and width must be whole numbers")
    return PrefixCard(**raw)


def read_json_object(path: Path, what: str) -> dict[str, Any]:
    """The JSON object in a file; ArtifactError where it is too large, damaged, or no object and so not `what` it should be."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ArtifactError(f"{path} is larger than {what} may be (1 MiB)")
        raw = json.loads(path.read_text())
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} is not readable JSON") from error
    if not isinstance(raw, dict):
        raise ArtifactError(f"{path} is not {what}")
    return raw


MIB = 1 << 20


def read_tensors(path: Path, what: str, most: int) -> dict[str, Tensor]:
    """All tensors of a file that holds `what`, of at most so many MiB; ArtifactError where it is missing, larger or damaged."""
    if not path.exists():
        raise ArtifactError(f"{path.parent} has no {path.name}")
    if path.stat().st_size > most * MIB:
        raise ArtifactError(f"{path} is larger than {what} may be ({most} MiB)")
    try:
        # Not mapped into memory: where such a file is written anew, reading on would end this process.
        return load(path.read_bytes())
    except SafetensorError as error:
        raise ArtifactError(f"{path} is not a whole safetensors file (truncated, or of another format)") from error
