"""Utility suites as JSON, as CSV, as a table for the terminal, and as logged figures."""

import csv as csvs
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from math import isfinite
from typing import Any

from rich.table import Table

from trimtab.evaluation.utility.metrics import MeasuredArm, UtilityMetrics, compute_metrics
from trimtab.stats.intervals import Estimate, Rate

# The figures of an arm on questions and on texts by name, with a title and a form for people.
ANSWERING = {"accuracy": ("accuracy", ".2f"), "change": ("against base", "+.2f"), "abstained": ("no answer", ".2f")}
READS = {"perplexity": ("perplexity", ".2f"), "factor": ("times base", ".3f"), "kl": ("KL, nats", ".4f")}


def compute_all_metrics(arm: UtilityMetrics) -> dict[str, Rate | Estimate]:
    """The figures that an arm has, by name."""
    found: dict[str, Rate | Estimate] = {}
    if arm.answering:
        found |= {name: getattr(arm.answering, name) for name in ANSWERING}
    if arm.reads:
        found |= {name: getattr(arm.reads, name) for name in READS}
    return found


def build_tables(measured: Sequence[MeasuredArm], title: str) -> list[Table]:
    """A table of what was answered and one of what was read, where there is each: one line an arm, with 95 % intervals."""
    arms = compute_metrics(measured)
    made: list[Table] = []
    for what, columns in (("questions", ANSWERING), ("texts", READS)):
        if not any(name in compute_all_metrics(arms[0]) for name in columns):
            continue
        first = next(iter(columns))
        shown = Table(title=f"{title}: {compute_all_metrics(arms[0])[first].count} {what}", title_justify="left")
        for column in ("arm", *(column for column, _ in columns.values())):
            shown.add_column(column, no_wrap=True)
        for arm in arms:
            shown.add_row(arm.arm, *(_shown(compute_all_metrics(arm)[name], form) for name, (_, form) in columns.items()))
        made.append(shown)
    return made


def metrics_as_json(measured: Sequence[MeasuredArm], answers: bool = True) -> dict[str, Any]:
    """`{"pooled": [{arm, seeds, accuracy, ..., sets}], "arms": [{name, answers, texts}]}`; each figure has value, low, high and
    count. Without `answers`, only what is pooled."""
    pooled = [
        {"arm": a.arm, "seeds": a.seeds}
        | {name: asdict(figure) for name, figure in compute_all_metrics(a).items()}
        | ({"sets": {key: asdict(rate) for key, rate in a.answering.sets.items()}} if a.answering else {})
        for a in compute_metrics(measured)
    ]
    if not answers:
        return {"pooled": pooled}
    return {"pooled": pooled, "arms": [_arm(one) for one in measured]}


def metrics_as_csv(suites: Mapping[str, Sequence[MeasuredArm]]) -> str:
    """One line for each suite, arm and figure: the mean over seeds, its interval, and the number of questions or texts."""
    file = io.StringIO()
    writer = csvs.writer(file, lineterminator="\n")
    writer.writerow(["suite", "arm", "seeds", "set", "measure", "value", "low", "high", "count"])
    for suite, measured in suites.items():
        for arm in compute_metrics(measured):
            for source, name, figure in _lines(arm):
                values = [f"{x:.6f}" if isfinite(x) else "" for x in (figure.value, figure.low, figure.high)]
                writer.writerow([suite, arm.arm, arm.seeds, source, name, *values, figure.count])
    return file.getvalue()


def get_logged_metrics(suites: Mapping[str, Sequence[MeasuredArm]]) -> dict[str, float]:
    """Figures for a tracked run, as `utility/SUITE/ARM/FIGURE`."""
    return {
        _safe(f"utility/{suite}/{arm.arm}/{name}"): figure.value
        for suite, measured in suites.items()
        for arm in compute_metrics(measured)
        for name, figure in compute_all_metrics(arm).items()
        if isfinite(figure.value)
    }


def _shown(figure: Rate | Estimate, form: str) -> str:
    value, low, high = (format(x, form) for x in (figure.value, figure.low, figure.high))
    return f"{value} [{low}, {high}]" if isfinite(figure.low) else value


def _lines(arm: UtilityMetrics) -> Iterator[tuple[str, str, Rate | Estimate]]:
    yield from (("all", name, figure) for name, figure in compute_all_metrics(arm).items())
    if arm.answering:
        yield from ((source, "accuracy", rate) for source, rate in arm.answering.sets.items())


def _arm(one: MeasuredArm) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": one.name}
    if one.answers:
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
            for a in one.answers
        ]
    if one.readings:
        entry["texts"] = [asdict(reading) for reading in one.readings]
    return entry


def _safe(name: str) -> str:
    """A name that MLflow takes for a metric."""
    return "".join(c if c.isalnum() or c in "/-_. " else "-" for c in name)
