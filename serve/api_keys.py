"""API keys in a file that holds their hashes only: who may ask, for what, and how much.

trimtab keys add alice --models 'smollm2-135m:*' --per_minute 60
"""

import hashlib
import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from filelock import FileLock
from rich.table import Table

from trimtab import settings
from trimtab.artifacts.card import read_json_object
from trimtab.cli.console import console, print_line
from trimtab.errors import ArtifactError, NotFoundError, UsageError
from trimtab.serve.config import ServeConfig

PREFIX = "tt-"
LOOPBACK = ("127.0.0.1", "::1", "localhost")
ANY = "*"


@dataclass(frozen=True)
class ApiKey:
    """Who may ask. `digest` is the SHA-256 of the token, of which 256 bits are random, so that a slow hash would add nothing;
    `models` are names with * that may be asked for; `per_minute` requests and `concurrent` ones at most on each replica, 0 for
    any number; `created` in seconds since 1970."""

    name: str
    digest: str
    models: list[str] = field(default_factory=lambda: [ANY])
    per_minute: int = 0
    concurrent: int = 0
    created: float = 0.0


@dataclass(frozen=True)
class AddConfig:
    """Make an API key; it is shown once, and only its hash is kept.

    Args:
        name: whose it is.
        models: what it may ask for, with * for any text: smollm2-135m, smollm2-135m:mine, 'smollm2-135m:*'.
        per_minute: requests a minute on each replica, 0 for any number.
        concurrent: requests at the same time on each replica, 0 for any number.
        file: file of keys, as `trimtab serve --key_file` takes it; without it, one in trimtab's home.
    """

    name: str
    models: list[str] = field(default_factory=lambda: [ANY], kw_only=True)
    per_minute: int = field(default=0, kw_only=True)
    concurrent: int = field(default=0, kw_only=True)
    file: str | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if not self.name or self.per_minute < 0 or self.concurrent < 0:
            raise UsageError("a key needs a name, and limits that are not below 0")


@dataclass(frozen=True)
class ListConfig:
    """List API keys, without their tokens, which nobody keeps.

    Args:
        file: file of keys; without it, the one in trimtab's home.
    """

    file: str | None = None


@dataclass(frozen=True)
class RemoveConfig:
    """Take an API key away; servers that use the file turn it down from then on.

    Args:
        name: whose it is.
        file: file of keys; without it, the one in trimtab's home.
    """

    name: str
    file: str | None = field(default=None, kw_only=True)


def get_default_path() -> Path:
    """The file of keys where none is named."""
    return settings.get_home() / "keys.json"


def read_keys(path: Path) -> list[ApiKey]:
    """The keys in a file; none where there is no file. Raises ArtifactError for one that is damaged."""
    if not path.exists():
        return []
    names = {f.name for f in fields(ApiKey)}
    held = read_json_object(path, "a file of keys").get("keys")
    if not isinstance(held, list) or not all(isinstance(k, dict) and {"name", "digest"} <= k.keys() <= names for k in held):
        raise ArtifactError(f"{path} is not a file of keys; trimtab keys add makes one")
    return [ApiKey(**k) for k in held]


def hash_key(token: str) -> str:
    """What is kept of a token."""
    return hashlib.sha256(token.encode()).hexdigest()


def get_required_key_file(config: ServeConfig) -> str | None:
    """The file of keys to ask for. Raises UsageError where others could come in without one."""
    path = Path(config.key_file) if config.key_file else get_default_path()
    known = read_keys(path)
    if config.key_file and not known:
        raise UsageError(f"there are no keys in {path}: make one with trimtab keys add NAME --file {path}")
    if not known and not config.open and config.host not in LOOPBACK:
        raise UsageError(
            f"on {config.host} anyone who reaches this machine could ask: make a key with trimtab keys add NAME, "
            "or say --open true"
        )
    return str(path.resolve()) if known else None


def run_keys_add(config: AddConfig) -> dict[str, Any]:
    """`trimtab keys add`: the token is the result, and nowhere else."""
    path = Path(config.file) if config.file else get_default_path()
    token = PREFIX + secrets.token_urlsafe(32)
    with FileLock(f"{path}.lock"):
        known = read_keys(path)
        if any(key.name == config.name for key in known):
            raise UsageError(f"there is a key of the name {config.name!r} already: remove it first, or choose another name")
        made = ApiKey(config.name, hash_key(token), config.models, config.per_minute, config.concurrent, time.time())
        _write(path, [*known, made])
    print_line(f"key of {config.name}, shown once: {token}")
    return {"name": config.name, "key": token, "file": str(path)}


def run_keys_remove(config: RemoveConfig) -> dict[str, Any]:
    """`trimtab keys remove`."""
    path = Path(config.file) if config.file else get_default_path()
    with FileLock(f"{path}.lock"):
        known = read_keys(path)
        if config.name not in (names := [key.name for key in known]):
            raise NotFoundError(f"no key {config.name!r} in {path}; there are: {', '.join(names) or 'none'}")
        _write(path, [key for key in known if key.name != config.name])
    print_line(f"{config.name} has no key any more")
    return {"name": config.name, "file": str(path)}


def run_keys_list(config: ListConfig) -> list[dict[str, Any]]:
    """`trimtab keys list`."""
    keys = read_keys(Path(config.file) if config.file else get_default_path())
    table = Table(*("name", "models", "a minute", "at once", "made"))
    for key in keys:
        made = time.strftime("%Y-%m-%d", time.localtime(key.created))
        table.add_row(key.name, " ".join(key.models), str(key.per_minute or "any"), str(key.concurrent or "any"), made)
    console.print(table)
    return [asdict(key) | {"digest": None} for key in keys]


def _write(path: Path, keys: Sequence[ApiKey]) -> None:
    """Whole or not at all, readable by its owner."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    partial.touch(mode=0o600)
    partial.write_text(json.dumps({"keys": [asdict(key) for key in keys]}, indent=1) + "\n")
    partial.replace(path)
