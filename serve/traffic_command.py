"""Command `trimtab traffic`: summary of a server's metrics by version of a prefix.

trimtab traffic --url http://localhost:8000
"""

from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families
from rich.table import Table

from trimtab import settings
from trimtab.cli.console import console
from trimtab.errors import JobError

Totals = dict[tuple[str, str, str], dict[str, float]]


@dataclass(frozen=True)
class TrafficConfig:
    """Show requests, latency and mean risk of each version of a prefix.

    The totals start with the server.

    Args:
        url: URL of the server.
        key: API key, if the server requires one; by default TRIMTAB_API_KEY, which other users of the machine cannot see.
    """

    url: str = "http://localhost:8000"
    key: str | None = None


@dataclass(frozen=True)
class TrafficLine:
    """Totals of one version of a prefix in one mode.

    Attributes:
        prefix: name of the prefix.
        version: version of the prefix.
        mode: "answer" or "shadow".
        requests: number of requests.
        failed: number of requests with a status other than 2xx.
        tokens: number of generated tokens.
        first_token_seconds: mean time to the first token (seconds), None if not measured.
        risk: mean risk of the answers, None if not measured.
    """

    prefix: str
    version: str
    mode: str
    requests: int
    failed: int
    tokens: int
    first_token_seconds: float | None
    risk: float | None


def run_traffic(config: TrafficConfig) -> list[dict[str, Any]]:
    """Run `trimtab traffic`.

    Returns:
        One line per version and mode, as JSON values.

    Raises:
        JobError: if the server does not answer.
    """
    lines = summarize_traffic(_fetch_metrics(config))
    table = Table(*("prefix", "version", "", "requests", "failed", "tokens", "first token", "mean risk"))
    for line in lines:
        first = "" if line.first_token_seconds is None else f"{line.first_token_seconds * 1000:.0f} ms"
        risk = "" if line.risk is None else f"{line.risk:.3f}"
        mode = "" if line.mode == "answer" else line.mode
        table.add_row(line.prefix, line.version, mode, str(line.requests), str(line.failed), str(line.tokens), first, risk)
    console.print(table)
    return [asdict(line) for line in lines]


def summarize_traffic(text: str) -> list[TrafficLine]:
    """Return one line for each version and mode.

    Args:
        text: metrics of a server in the Prometheus text format.
    """
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
            sums = totals[labels["prefix"], labels["version"], labels["mode"]]
            sums[sample.name] += sample.value
            if sample.name == "trimtab_requests_total" and not labels["status"].startswith("2"):
                sums["failed"] += sample.value
    return [_build_line(*key, sums) for key, sums in sorted(totals.items())]


def _build_line(prefix: str, version: str, mode: str, sums: dict[str, float]) -> TrafficLine:
    return TrafficLine(
        prefix,
        version,
        mode,
        int(sums["trimtab_requests_total"]),
        int(sums["failed"]),
        int(sums["trimtab_tokens_total"]),
        _compute_mean(sums, "trimtab_first_token_seconds"),
        _compute_mean(sums, "trimtab_risk"),
    )


def _compute_mean(sums: dict[str, float], name: str) -> float | None:
    count = sums[f"{name}_count"]
    return sums[f"{name}_sum"] / count if count else None


def _fetch_metrics(config: TrafficConfig) -> str:
    try:
        response = httpx.get(f"{config.url.rstrip('/')}/metrics", headers=settings.build_key_header(config.key), timeout=30)
    except httpx.HTTPError as error:
        raise JobError(f"no server answers at {config.url}: {error}") from error
    if not response.is_success:
        raise JobError(f"{config.url}/metrics returned status {response.status_code}: {response.text[:200]}")
    return response.text
