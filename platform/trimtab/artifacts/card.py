"""Card of an artifact: a JSON file with its identity, base model, training method and data."""

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
    """Card of a prefix.

    Attributes:
        kind: kind of the artifact.
        name: name of the prefix.
        base: name of the base model that the prefix was trained for.
        fingerprint: base model fingerprint.
        place: position of the prefix in the prompt.
        rows: number of vectors, k.
        width: width of a vector, d.
        digest: SHA-256 of the float32 bytes of the vectors, in hex.
        method: objective and its full config.
        data: one entry {name, digest, rows} per input data set.
        metrics: results of the training and the evaluation.
        run_id: id of the MLflow run.
        card_version: version of the card's format.
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
    """Write the card of an artifact into its folder.

    Write the other files first: a folder with a card counts as complete.
    """
    write_atomic(folder / FILE, json.dumps(asdict(card), indent=2, sort_keys=True) + "\n")


def read_card(folder: Path) -> PrefixCard:
    """Read the card in an artifact's folder.

    Raises:
        ArtifactError: if the card is missing, damaged or of an unknown version.
    """
    path = folder / FILE
    if not path.exists():
        raise ArtifactError(f"{folder} has no {FILE}. An artifact is a folder with a card and a safetensors file")
    raw = read_json_object(path, "a card")
    if raw.get("card_version") != CARD_VERSION:
        raise ArtifactError(
            f"{path} has card version {raw.get('card_version')!r}, but this trimtab reads {CARD_VERSION}: update trimtab"
        )
    names = {f.name for f in fields(PrefixCard)}
    missing = {"kind", "name", "base", "fingerprint", "place", "rows", "width", "digest"} - raw.keys()
    if missing or raw.keys() - names:
        raise ArtifactError(f"{path}: missing fields {sorted(missing)}, unknown fields {sorted(raw.keys() - names)}")
    if raw["kind"] != "prefix" or raw["place"] not in POSITIONS:
        raise ArtifactError(f"{path}: unknown kind {raw['kind']!r} or place {raw['place']!r}")
    if not all(type(raw[name]) is int for name in ("rows", "width")):
        raise ArtifactError(f"{path}: rows and width must be whole numbers")
    return PrefixCard(**raw)


def read_json_object(path: Path, what: str) -> dict[str, Any]:
    """Read the JSON object in a file.

    Args:
        path: file of at most 1 MiB.
        what: noun for error messages, such as "a card".

    Raises:
        ArtifactError: if the file is unreadable, too large, no valid JSON, or not an object.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ArtifactError(f"{path} is too large for {what}: the limit is 1 MiB")
        raw = json.loads(path.read_text())
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} is not readable JSON") from error
    if not isinstance(raw, dict):
        raise ArtifactError(f"{path} is not {what}")
    return raw


MIB = 1 << 20


def read_tensors(path: Path, what: str, max_mib: int) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file.

    Args:
        path: file to read.
        what: noun for error messages, such as "a prefix".
        max_mib: maximum size of the file in MiB.

    Returns:
        Tensors by name.

    Raises:
        ArtifactError: if the file is missing, too large or damaged.
    """
    if not path.exists():
        raise ArtifactError(f"{path.parent} has no {path.name}")
    if path.stat().st_size > max_mib * MIB:
        raise ArtifactError(f"{path} is too large for {what}: the limit is {max_mib} MiB")
    try:
        # Not memory-mapped: if another process rewrites a mapped file, the next access crashes this process.
        return load(path.read_bytes())
    except SafetensorError as error:
        raise ArtifactError(f"{path} is not a whole safetensors file: it is truncated or of another format") from error
