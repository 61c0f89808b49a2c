"""Comparison of a running server with the registry, for `trimtab list --live`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from trimtab import settings
from trimtab.errors import JobError
from trimtab.tracking.registry import Version


@dataclass(frozen=True)
class AliasStatus:
    """Status of an alias of a prefix or detector.

    Attributes:
        model: name as `base:name`.
        alias: alias, such as "champion".
        live: version that the server uses; None if it uses none.
        registered: version to which the alias points in the registry; None if the registry does not have the alias.
        refused: reason why the server refuses the registered version; None if it does not.
    """

    model: str
    alias: str
    live: int | None
    registered: int | None
    refused: str | None


def list_alias_status(url: str, key: str | None, registered: Sequence[Version]) -> list[AliasStatus]:
    """Return the status of each alias of the server or the registry.

    Args:
        url: address of the server.
        key: API key, if the server requires one.
        registered: versions in the registry.

    Returns:
        Status of each alias, sorted by model and alias.

    Raises:
        JobError: if no trimtab server answers at the address.
    """
    base, *prefixes = _fetch_models(url, key)
    live = {f"{base['id']}:{name}": aliases for name, aliases in base["trimtab"]["detectors"].items()}
    live |= {model["id"]: model["trimtab"]["aliases"] for model in prefixes}
    refused = {
        f"{base['id']}:{name}": reason for model in (base, *prefixes) for name, reason in model["trimtab"]["refused"].items()
    }
    expected = {(f"{v.base}:{v.name}", alias): v.version for v in registered if v.base == base["id"] for alias in v.aliases}
    keys = sorted({(model, alias) for model, aliases in live.items() for alias in aliases} | expected.keys())
    return [
        AliasStatus(m, a, live.get(m, {}).get(a), expected.get((m, a)), refused.get(f"{m}@{expected.get((m, a))}"))
        for m, a in keys
    ]


def _fetch_models(url: str, key: str | None) -> list[dict[str, Any]]:
    address = f"{url.rstrip('/')}/v1/models"
    try:
        response = httpx.get(address, headers=settings.build_key_header(key), timeout=30)
        if not response.is_success:
            raise JobError(f"{address} returned HTTP {response.status_code}: {response.text[:200]}")
        models: list[dict[str, Any]] = response.json()["data"]
        if "trimtab" not in models[0]:
            raise JobError(f"{address} is not a trimtab server")
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, IndexError) as error:
        raise JobError(f"no trimtab server answers at {address}: {error}") from error
    return models
