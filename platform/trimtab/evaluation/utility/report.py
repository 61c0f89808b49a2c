"""Utility metrics as JSON, CSV, terminal tables and logged metrics."""

import csv as csvs
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from math import isfinite
from typing import Any

from rich.table import Table

from trimtab.evaluation.utility.metrics import MeasuredArm, UtilityMetrics, compute_metrics
from trimtab.stats.intervals import Estimate, Rate
from trimtab.util.identifiers import sanitize_name

# Metrics on questions and on texts: column title and number format by metric name.
ANSWERING = {"accuracy": ("accuracy", ".2f"), "change": ("against base", "+.2f"), "abstained": ("no answer", ".2f")}
READS = {"perplexity": ("perplexity", ".2f"), "factor": ("times base", ".3f"), "kl": ("KL, nats", ".4f")}


def compute_all_metrics(arm: UtilityMetrics) -> dict[str, Rate | Estimate]:
    """Return the available metrics of an arm by name, first those on questions, then those on texts."""
    metrics: dict[str, Rate | Estimate] = {}
    if arm.answering:
        metrics |= {name: getattr(arm.answering, name) for name in ANSWERING}
    if arm.reads:
        metrics |= {name: getattr(arm.reads, name) for name in READS}
    return metrics


def build_tables(measured: Sequence[MeasuredArm], title: str) -> list[Table]:
    """Build the terminal tables of a suite, with one row per arm and 95 % intervals.

    Args:
        measured: measurements of all arms on the suite.
        title: prefix of the table titles.

    Returns:
        A table of the metrics on questions and one of the metrics on texts, as far as the suite has them.

    Raises:
        UsageError: for the same reasons as `compute_metrics`.
    """
    arms = compute_metrics(measured)
    tables: list[Table] = []
    for noun, columns in (("questions", ANSWERING), ("texts", READS)):
        if not any(name in compute_all_metrics(arms[0]) for name in columns):
            continue
        first = next(iter(columns))
        table = Table(title=f"{title}: {compute_all_metrics(arms[0])[first].count} {noun}", title_justify="left")
        for column in ("arm", *(column for column, _ in columns.values())):
            table.add_column(column, no_wrap=True)
        for arm in arms:
            table.add_row(arm.arm, *(_format(compute_all_metrics(arm)[name], form) for name, (_, form) in columns.items()))
        tables.append(table)
    return tables


def metrics_as_json(measured: Sequence[MeasuredArm], answers: bool = True) -> dict[str, Any]:
    """Convert the measurements of a suite to JSON.

    Args:
        measured: measurements of all arms on the suite.
        answers: include the answers and text scores of every seed, under `arms`.

    Returns:
        `{"pooled": [{arm, seeds, accuracy, ..., sets}], "arms": [{name, answers, texts}]}`; each metric has the keys value,
        low, high and count.

    Raises:
        UsageError: for the same reasons as `compute_metrics`.
    """
    pooled = [
        {"arm": a.arm, "seeds": a.seeds}
        | {name: asdict(metric) for name, metric in compute_all_metrics(a).items()}
        | ({"sets": {key: asdict(rate) for key, rate in a.answering.sets.items()}} if a.answering else {})
        for a in compute_metrics(measured)
    ]
    if not answers:
        return {"pooled": pooled}
    return {"pooled": pooled, "arms": [_measured_arm_as_json(m) for m in measured]}


def metrics_as_csv(suites: Mapping[str, Sequence[MeasuredArm]]) -> str:
    """Convert all suites to CSV: one row per suite, arm, set and metric.

    A row holds the mean over seeds, its interval, and the number of questions or texts.
    """
    file = io.StringIO()
    writer = csvs.writer(file, lineterminator="\n")
    writer.writerow(["suite", "arm", "seeds", "set", "measure", "value", "low", "high", "count"])
    for suite, measured in suites.items():
        for arm in compute_metrics(measured):
            for source, name, metric in _list_metrics(arm):
                values = [f"{x:.6f}" if isfinite(x) else "" for x in (metric.value, metric.low, metric.high)]
                writer.writerow([suite, arm.arm, arm.seeds, source, name, *values, metric.count])
    return file.getvalue()


def get_logged_metrics(suites: Mapping[str, Sequence[MeasuredArm]]) -> dict[str, float]:
    """Return the finite metrics to log to MLflow, named `utility/SUITE/ARM/METRIC`."""
    return {
        sanitize_name(f"utility/{suite}/{arm.arm}/{name}"): metric.value
        for suite, measured in suites.items()
        for arm in compute_metrics(measured)
        for name, metric in compute_all_metrics(arm).items()
        if isfinite(metric.value)
    }


def _format(metric: Rate | Estimate, form: str) -> str:
    value, low, high = (format(x, form) for x in (metric.value, metric.low, metric.high))
    return f"{value} [{low}, {high}]" if isfinite(metric.low) else value


def _list_metrics(arm: UtilityMetrics) -> Iterator[tuple[str, str, Rate | Estimate]]:
    yield from (("all", name, metric) for name, metric in compute_all_metrics(arm).items())
    if arm.answering:
        yield from ((source, "accuracy", rate) for source, rate in arm.answering.sets.items())


def _measured_arm_as_json(measured: MeasuredArm) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": measured.name}
    if measured.answers:
        entry["answers"] = [
            {
                "question": a.question.question,
                "wanted": list(a.question.answers),
                "source": a.question.source,
                "answer": a.answer,
                "score": a.mark.score,
                "why": a.mark.why,
                "abstained": a.mark.abstained,
            }
            for a in measured.answers
        ]
    if measured.readings:
        entry["texts"] = [asdict(reading) for reading in measured.readings]
    return entry
