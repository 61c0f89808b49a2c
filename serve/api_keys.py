"""API keys: a file of hashed keys with their allowed models and rate limits.

trimtab keys add alice --models '["smollm2-135m:*"]' --per_minute 60
"""

import hashlib
import json
import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock
from rich.table import Table

from trimtab import settings
from trimtab.cli.console import console, print_line
from trimtab.engine.policies import DIGITS, parse_policies
from trimtab.engine.request_context import KeyRights
from trimtab.errors import ArtifactError, NotFoundError, UsageError
from trimtab.serve.config import ServeConfig
from trimtab.util.json_files import read_json_object

PREFIX = "tt-"
LOOPBACK = ("127.0.0.1", "localhost")
ANY = "*"
COARSE_DIGITS = 1
DIGEST = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class ApiKey:
    """Stored API key.

    Attributes:
        name: name of the key's owner.
        digest: SHA-256 of the token. A token has 256 random bits, so that a slow hash would not add security.
        models: patterns of the allowed model names, with * for any text.
        per_minute: maximum number of requests per minute on each replica, 0 for no limit.
        concurrent: maximum number of concurrent requests on each replica, 0 for the server's default.
        created: creation time (seconds since 1970).
        metrics: whether the key may read `/metrics`, which names the prefixes and counts the requests of all keys.
        policies: policies on the prompts and answers of the key's requests, in addition to those of the server.
        coarse_scores: whether probabilities of detectors of prompts are rounded to tenths.
        rater: whether the key may label the answers of all keys, as a rater that the operator trusts.
    """

    name: str
    digest: str
    models: list[str] = field(default_factory=lambda: [ANY])
    per_minute: int = 0
    concurrent: int = 0
    created: float = 0.0
    metrics: bool = False
    policies: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    coarse_scores: bool = False
    rater: bool = False

    @cached_property
    def rights(self) -> KeyRights:
        """Rights and policies, as the engine reads them."""
        digits = COARSE_DIGITS if self.coarse_scores else DIGITS
        return KeyRights(parse_policies(self.policies, "policies"), self.allows_model, digits, self.rater)

    def allows_model(self, model: str) -> bool:
        """Return whether a pattern of the key matches a model name. Only * is special: names may contain brackets."""
        return any(re.fullmatch(".*".join(map(re.escape, pattern.split(ANY))), model, re.DOTALL) for pattern in self.models)


@dataclass(frozen=True)
class AddConfig:
    """Create an API key, which is shown once.

    Only its hash is stored.

    Args:
        name: name of the key's owner.
        models: allowed models, with * for any text: smollm2-135m, smollm2-135m:mine, 'smollm2-135m:*'.
        per_minute: maximum number of requests per minute on each replica, 0 for no limit.
        concurrent: maximum number of concurrent requests on each replica, 0 for the server's `--max_concurrent_per_key`.
        metrics: allow the key to read /metrics, which Prometheus and `trimtab traffic` need.
        policies: policies on the prompts and answers of the key's requests, as for `trimtab serve --policies`.
        coarse_scores: round the probabilities of detectors of prompts to tenths, so that they are harder to copy or to evade.
        file: key file, as for `trimtab serve --api_key_file`; by default the one in trimtab's home.
        rater: let the key label the answers of all keys with `POST /v1/feedback`, as a rater that you trust.
    """

    name: str
    models: list[str] = field(default_factory=lambda: [ANY], kw_only=True)
    per_minute: int = field(default=0, kw_only=True)
    concurrent: int = field(default=0, kw_only=True)
    metrics: bool = field(default=False, kw_only=True)
    policies: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]], kw_only=True)
    coarse_scores: bool = field(default=False, kw_only=True)
    file: str | None = field(default=None, kw_only=True)
    rater: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        if not self.name or self.per_minute < 0 or self.concurrent < 0:
            raise UsageError("a key needs a name, and limits of at least 0")
        parse_policies(self.policies, "policies")


@dataclass(frozen=True)
class ListConfig:
    """List the API keys and their limits.

    Args:
        file: key file; by default the one in trimtab's home.
    """

    file: str | None = None


@dataclass(frozen=True)
class RemoveConfig:
    """Remove an API key.

    Running servers that use the file reject it from then on.

    Args:
        name: name of the key's owner.
        file: key file; by default the one in trimtab's home.
    """

    name: str
    file: str | None = field(default=None, kw_only=True)


def get_default_path() -> Path:
    """Return the path of the default key file."""
    return settings.get_home() / "keys.json"


def read_keys(path: Path) -> list[ApiKey]:
    """Return the keys in a file; an empty list if there is no file.

    Raises:
        ArtifactError: if the file is damaged.
    """
    if not path.exists():
        return []
    entries = read_json_object(path, "a key file").get("keys")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) and _is_valid(entry) for entry in entries):
        raise ArtifactError(f"{path} is not a key file. Create one with trimtab keys add")
    return [ApiKey(**k) for k in entries]


def _is_valid(entry: dict[str, Any]) -> bool:
    """Return whether an entry of a key file has the fields of a key with values of their types, as people may edit the file."""
    key: dict[str, Any] = {"models": [ANY], "per_minute": 0, "concurrent": 0, "created": 0.0, "metrics": False}
    key |= {"policies": [], "coarse_scores": False, "rater": False} | entry
    return (
        {"name", "digest"} <= entry.keys() <= {f.name for f in fields(ApiKey)}
        and isinstance(key["name"], str)
        and isinstance(key["digest"], str)
        and DIGEST.fullmatch(key["digest"]) is not None
        and isinstance(key["models"], list)
        and all(isinstance(pattern, str) for pattern in key["models"])
        and all(type(key[limit]) is int and key[limit] >= 0 for limit in ("per_minute", "concurrent"))
        and isinstance(key["created"], int | float)
        and all(isinstance(key[flag], bool) for flag in ("metrics", "coarse_scores", "rater"))
        and _are_policies(key["policies"])
    )


def _are_policies(value: Any) -> bool:
    try:
        parse_policies(value, "policies")
    except UsageError:
        return False
    return True


def hash_key(token: str) -> str:
    """Return the SHA-256 of a token in hexadecimal digits."""
    return hashlib.sha256(token.encode()).hexdigest()


def get_required_key_file(config: ServeConfig) -> str | None:
    """Return the path of the key file that the server must enforce; None if it serves without keys.

    Raises:
        UsageError: if the given key file is empty, or the server would be open to other machines.
    """
    path = Path(config.api_key_file) if config.api_key_file else get_default_path()
    keys = read_keys(path)
    if config.api_key_file and not keys:
        raise UsageError(f"no API keys in {path}. Create one with trimtab keys add NAME --file {path}")
    if not keys and not config.allow_unauthenticated and config.host not in LOOPBACK:
        raise UsageError(
            f"the server on {config.host} would be open to other machines. Create a key with trimtab keys add NAME, "
            "or set --allow_unauthenticated true"
        )
    # Links stay: Kubernetes mounts a Secret as links to a folder that differs between pods, and that a change replaces.
    return str(path.absolute()) if keys else None


def run_keys_add(config: AddConfig) -> dict[str, Any]:
    """Run `trimtab keys add`.

    Returns:
        Name, token and key file; the token is stored nowhere else.

    Raises:
        UsageError: if the name is taken.
    """
    path = Path(config.file) if config.file else get_default_path()
    token = PREFIX + secrets.token_urlsafe(32)
    with FileLock(f"{path}.lock"):
        keys = read_keys(path)
        if any(key.name == config.name for key in keys):
            raise UsageError(f"a key named {config.name!r} already exists. Remove it first, or choose another name")
        limits = config.models, config.per_minute, config.concurrent
        options = config.metrics, config.policies, config.coarse_scores, config.rater
        new_key = ApiKey(config.name, hash_key(token), *limits, time.time(), *options)
        _write_keys(path, [*keys, new_key])
    print_line(f"API key of {config.name}, shown only once: {token}")
    return {"name": config.name, "key": token, "file": str(path)}


def run_keys_remove(config: RemoveConfig) -> dict[str, Any]:
    """Run `trimtab keys remove`.

    Returns:
        Name and key file.

    Raises:
        NotFoundError: if there is no key of this name.
    """
    path = Path(config.file) if config.file else get_default_path()
    with FileLock(f"{path}.lock"):
        keys = read_keys(path)
        if config.name not in (names := [key.name for key in keys]):
            raise NotFoundError(f"no key {config.name!r} in {path}; there are: {', '.join(names) or 'none'}")
        _write_keys(path, [key for key in keys if key.name != config.name])
    print_line(f"API key of {config.name} removed")
    return {"name": config.name, "file": str(path)}


def run_keys_list(config: ListConfig) -> list[dict[str, Any]]:
    """Run `trimtab keys list`.

    Returns:
        The keys as JSON values, without digests.
    """
    keys = read_keys(Path(config.file) if config.file else get_default_path())
    table = Table(*("name", "models", "per minute", "concurrent", "metrics", "created"))
    for key in keys:
        created = time.strftime("%Y-%m-%d", time.localtime(key.created))
        limits = str(key.per_minute or "any"), str(key.concurrent or "default")
        table.add_row(key.name, " ".join(key.models), *limits, "yes" if key.metrics else "", created)
    console.print(table)
    return [asdict(key) | {"digest": None} for key in keys]


def _write_keys(path: Path, keys: Sequence[ApiKey]) -> None:
    """Write the key file atomically, readable by its owner only."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    partial.touch(mode=0o600)
    partial.write_text(json.dumps({"keys": [asdict(key) for key in keys]}, indent=1) + "\n")
    partial.replace(path)
