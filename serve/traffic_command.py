"""`trimtab traffic`: what each version of a prefix got, and how it did, by a server's own metrics.

trimtab traffic --url http://localhost:8000
"""

from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families
from rich.table import Table

from trimtab.cli.console import console
from trimtab.errors import JobError

Totals = dict[tuple[str, str, str], dict[str, float]]


@dataclass(frozen=True)
class TrafficConfig:
    """What each version got, and how it did, since the server started.

    Args:
        url: the server.
        key: API key, where the server asks for one.
    """

    url: str = "http://localhost:8000"
    key: str | None = None


@dataclass(frozen=True)
class TrafficLine:
    """A prefix's version, as it answered or as a shadow; means are None where nothing was measured."""

    prefix: str
    version: str
    mode: str
    requests: int
    failed: int
    tokens: int
    first_token_seconds: float | None
    risk: float | None


def run_traffic(config: TrafficConfig) -> list[dict[str, Any]]:
    """`trimtab traffic`."""
    lines = summarize_traffic(_metrics(config))
    table = Table(*("prefix", "version", "", "requests", "failed", "tokens", "first token", "mean risk"))
    for line in lines:
        first = "" if line.first_token_seconds is None else f"{line.first_token_seconds * 1000:.0f} ms"
        risk = "" if line.risk is None else f"{line.risk:.3f}"
        mode = "" if line.mode == "answer" else line.mode
        table.add_row(line.prefix, line.version, mode, str(line.requests), str(line.failed), str(line.tokens), first, risk)
    console.print(table)
    return [asdict(line) for line in lines]


def summarize_traffic(text: str) -> list[TrafficLine]:
    """One line for each version and mode in a server's `/metrics`."""
    totals: Totals = defaultdict(lambda: defaultdict(float))
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if (
                not sample.name.startswith("trimtab_")
                or "mode" not in sample.labels
                or sample.name.endswith(("_bucket", "_created"))
            ):
                continue
            labels = sample.labels
            held = totals[labels["prefix"], labels["version"], labels["mode"]]
            held[sample.name] += sample.value
            if sample.name == "trimtab_requests_total" and not labels["status"].startswith("2"):
                held["failed"] += sample.value
    return [_line(*key, held) for key, held in sorted(totals.items())]


def _line(prefix: str, version: str, mode: str, held: dict[str, float]) -> TrafficLine:
    return TrafficLine(
        prefix,
        version,
        mode,
        int(held["trimtab_requests_total"]),
        int(held["failed"]),
        int(held["trimtab_tokens_total"]),
        _mean(held, "trimtab_first_token_seconds"),
        _mean(held, "trimtab_risk"),
    )


def _mean(held: dict[str, float], name: str) -> float | None:
    count = held[f"{name}_count"]
    return held[f"{name}_sum"] / count if count else None


def _metrics(config: TrafficConfig) -> str:
    headers = {"authorization": f"Bearer {config.key}"} if config.key else {}
    try:
        reply = httpx.get(f"{config.url.rstrip('/')}/metrics", headers=headers, timeout=30)
    except httpx.HTTPError as error:
        raise JobError(f"no server answers at {config.url}: {error}") from error
    if not reply.is_success:
        raise JobError(f"{config.url}/metrics answered {reply.status_code}: {reply.text[:200]}")
    return reply.text
