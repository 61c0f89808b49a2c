"""Card of an artifact: a JSON file with its identity, base model, training method and data."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import Field, asdict, dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from trimtab.errors import ArtifactError
from trimtab.model.base_model import BaseModel
from trimtab.types import Otherwise, Position, Side
from trimtab.util.atomic_files import write_atomic
from trimtab.util.json_files import read_json_object

CARD_VERSION = 2
FILE = "card.json"
# Name of the checksum in the file. It is not a field of the dataclasses: it is computed when a card is written.
CHECKSUM = "checksum"
# Rules for the fields of a card that is read: exact types, finite numbers, no unknown fields.
STRICT = ConfigDict(strict=True, allow_inf_nan=False, extra="forbid")


class Card(Protocol):
    """Dataclass whose fields are those of a card."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]


CardT = TypeVar("CardT", bound=Card)


class BaseModelCard(Protocol):
    """Card of an artifact that belongs to one base model."""

    @property
    def base(self) -> str:
        """Name of the base model."""
        ...

    @property
    def fingerprint(self) -> str:
        """Base model fingerprint."""
        ...

    @property
    def width(self) -> int:
        """Width of the base model."""
        ...


@dataclass(frozen=True)
class PrefixCondition:
    """Condition under which a prefix steers a request: its prompt is on one side of a threshold of a detector.

    Attributes:
        detector: NAME, NAME@ALIAS or NAME@VERSION of a detector that reads prompts without a prefix.
        side: `above` steers prompts that the detector flags, `below` the others.
        threshold: risk above which a prompt is flagged; if None, a threshold of the detector.
        false_positive_rate: false positive rate that selects the detector's threshold; if None, the balanced threshold.
        otherwise: answer to the prompts that it does not steer: `base` is that of the base model, `refuse` a fixed refusal, for
            side `below` only.
    """

    detector: str
    side: Side
    threshold: float | None = None
    false_positive_rate: float | None = None
    otherwise: Otherwise = "base"


@dataclass(frozen=True)
class PrefixCard:
    """Card of a prefix.

    Attributes:
        kind: kind of the artifact.
        name: name of the prefix.
        base: name of the base model that the prefix was trained for.
        fingerprint: base model fingerprint.
        position: position of the prefix in the prompt.
        num_virtual_tokens: number of vectors, k.
        width: width of a vector, d.
        digest: SHA-256 of the float32 bytes of the vectors, in hex.
        method: objective and its full config.
        data: one entry {name, digest, rows} per input data set.
        metrics: results of the training and the evaluation.
        run_id: id of the MLflow run.
        condition: condition under which the prefix steers a request; None for all requests.
        card_version: version of the card's format.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    kind: Literal["prefix"]
    name: str
    base: str
    fingerprint: str
    position: Position
    num_virtual_tokens: int
    width: int
    digest: str
    method: dict[str, Any] = field(default_factory=dict[str, Any])
    data: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    metrics: dict[str, float] = field(default_factory=dict[str, float])
    run_id: str | None = None
    condition: PrefixCondition | None = None
    card_version: int = CARD_VERSION


def write_card(card: Card, folder: Path) -> None:
    """Write the card of an artifact into its folder.

    Write the other files first: a folder with a card counts as complete. Metrics that are not finite are left out.
    """
    values = asdict(card)
    if "metrics" in values:
        values["metrics"] = {name: value for name, value in values["metrics"].items() if isfinite(value)}
    write_atomic(folder / FILE, json.dumps(add_checksum(values), indent=2, sort_keys=True) + "\n")


def add_checksum(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a card with the SHA-256 of their JSON, which replaces an earlier one.

    Args:
        values: fields of a card.
    """
    content = {name: value for name, value in values.items() if name != CHECKSUM}
    return content | {CHECKSUM: hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()}


def read_card(folder: Path) -> PrefixCard:
    """Read the card of a prefix.

    Raises:
        ArtifactError: if the card is missing, damaged, of another kind or of an unknown version.
    """
    return read_card_as(PrefixCard, folder, "prefix", {"place": "position", "rows": "num_virtual_tokens"})


def read_card_as(card_class: type[CardT], folder: Path, kind: str, renamed: Mapping[str, str]) -> CardT:
    """Read a card of any kind, and check its checksum and the names, types and finiteness of its fields.

    Args:
        card_class: dataclass of the card, with the config `STRICT`. Fields without a default are required.
        folder: folder of the artifact.
        kind: expected kind of the artifact.
        renamed: names of fields in version 2 by their names in version 1, which release 0.1.0 wrote.

    Raises:
        ArtifactError: if the card is missing, damaged, changed by hand, of another kind or of an unknown version.
    """
    path = folder / FILE
    if not path.exists():
        raise ArtifactError(f"{folder} has no {FILE}. An artifact is a folder with a card and a safetensors file")
    raw = read_json_object(path, "a card")
    if raw.get("kind") != kind:
        raise ArtifactError(f"{path} is the card of a {raw.get('kind')!r}, not of a {kind}")
    # The first version of refusal heads had a version field of its own.
    version = raw.pop("head_version", None) or raw.get("card_version")
    if version == 1:
        raw = {renamed.get(name, name): value for name, value in raw.items()} | {"card_version": CARD_VERSION}
    elif version != CARD_VERSION:
        raise ArtifactError(f"{path} has card version {version!r}, but this trimtab reads 1 and {CARD_VERSION}. Update trimtab")
    elif raw != add_checksum(raw):
        raise ArtifactError(f"{path} was changed after it was written (checksum differs). Train or export the {kind} again")
    try:
        # As JSON: in Python objects, pydantic's strict mode accepts no dictionary in the place of a dataclass.
        return TypeAdapter(card_class).validate_json(json.dumps({k: v for k, v in raw.items() if k != CHECKSUM}))
    except ValidationError as error:
        first = error.errors()[0]
        field_name = ".".join(str(part)[:50] for part in first["loc"])
        raise ArtifactError(f"{path}: field {field_name} is invalid: {first['msg'].lower()}") from error


def check_base_model(card: BaseModelCard, base: BaseModel, what: str, remedy: str) -> None:
    """Check that an artifact was made for exactly this base model (width and fingerprint).

    Args:
        card: card of the artifact.
        base: base model to use the artifact with.
        what: artifact in the error message, such as "prefix 'safety'".
        remedy: what the user can do, as a sentence without its period.

    Raises:
        ArtifactError: if the artifact was made for another base model.
    """
    if (card.width, card.fingerprint) != (base.width, base.fingerprint):
        raise ArtifactError(
            f"{what} does not match {base.name} (width {base.width}, {base.fingerprint}): "
            f"it was made for base model {card.base} (width {card.width}, {card.fingerprint}). {remedy}"
        )


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
    # KeyError: a dtype that torch does not have.
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise ArtifactError(f"{path} is not a whole safetensors file: it is truncated or of another format") from error
