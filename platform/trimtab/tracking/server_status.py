"""`trimtab list --live`: what a running server answers with, beside what the registry says."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from trimtab.errors import JobError
from trimtab.tracking.registry import Version


@dataclass(frozen=True)
class AliasStatus:
    """An alias of a prefix or detector: the version that answers (None: none does), the one that the registry names, and why it
    is refused, where it is."""

    model: str
    alias: str
    live: int | None
    registered: int | None
    refused: str | None


def list_alias_status(url: str, key: str | None, registered: Sequence[Version]) -> list[AliasStatus]:
    """One line for each alias that the server or the registry knows. Raises JobError where no server of trimtab answers."""
    base, *steered = _models(url, key)
    live = {f"{base['id']}:{name}": aliases for name, aliases in base["trimtab"]["detectors"].items()}
    live |= {model["id"]: model["trimtab"]["aliases"] for model in steered}
    refused = {f"{base['id']}:{k}": why for model in (base, *steered) for k, why in model["trimtab"]["refused"].items()}
    wanted = {(f"{v.base}:{v.name}", alias): v.version for v in registered if v.base == base["id"] for alias in v.aliases}
    keys = sorted({(model, alias) for model, aliases in live.items() for alias in aliases} | wanted.keys())
    return [
        AliasStatus(m, a, live.get(m, {}).get(a), wanted.get((m, a)), refused.get(f"{m}@{wanted.get((m, a))}")) for m, a in keys
    ]


def _models(url: str, key: str | None) -> list[dict[str, Any]]:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    address = f"{url.rstrip('/')}/v1/models"
    try:
        answer = httpx.get(address, headers=headers, timeout=30)
        if not answer.is_success:
            raise JobError(f"{address} answers {answer.status_code}: {answer.text[:200]}")
        models: list[dict[str, Any]] = answer.json()["data"]
        if "trimtab" not in models[0]:
            raise JobError(f"{address} is no server of trimtab")
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, IndexError) as error:
        raise JobError(f"no server of trimtab answers at {address}: {error}") from error
    return models
