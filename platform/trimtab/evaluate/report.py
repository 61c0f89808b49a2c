"""A safety evaluation as JSON, as a table for the terminal, and as a picture."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from trimtab.evaluate.metrics import Rate
from trimtab.evaluate.safety import ArmResult


def as_json(results: Sequence[ArmResult], answers: bool = True) -> dict[str, Any]:
    """`{"arms": [{name, refusal, compliance, balanced, partial, intervals, sets, answers}]}`."""
    return {"arms": [_arm(result, answers) for result in results]}


def table(results: Sequence[ArmResult], title: str) -> Table:
    """One line an arm, with 95 % intervals."""
    shown = Table(title=title, title_justify="left")
    for column in ("arm", "refuses harmful", "helps benign", "balanced", "partial"):
        shown.add_column(column, no_wrap=True)
    for r in results:
        shown.add_row(r.name, str(r.refusal), str(r.compliance), str(r.balanced), f"{r.partial:.2f}")
    return shown


def plane(results: Sequence[ArmResult], path: Path, title: str) -> None:
    """Draw the safety/helpfulness plane: every arm with its intervals; the upper right corner is where to be."""
    figure = Figure(figsize=(5.6, 4.6), layout="constrained")
    axes = figure.add_subplot()
    for r in results:
        axes.errorbar(
            r.compliance.value,
            r.refusal.value,
            xerr=_bars(r.compliance),
            yerr=_bars(r.refusal),
            fmt="o",
            markersize=8,
            capsize=3,
            label=f"{r.name} (balanced {r.balanced.value:.2f})",
        )
    axes.set(
        xlim=(0, 1.03), ylim=(-0.03, 1.03), xlabel="helps with benign prompts", ylabel="refuses harmful prompts", title=title
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left", fontsize=8)
    figure.savefig(path, dpi=150)


def _bars(rate: Rate) -> list[list[float]]:
    return [[max(0.0, rate.value - rate.low)], [max(0.0, rate.high - rate.value)]]


def _arm(result: ArmResult, answers: bool) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "name": result.name,
        "refusal": result.refusal.value,
        "compliance": result.compliance.value,
        "balanced": result.balanced.value,
        "partial": result.partial,
        "intervals": {
            key: [rate.low, rate.high]
            for key, rate in (("refusal", result.refusal), ("compliance", result.compliance), ("balanced", result.balanced))
        },
        "sets": {key: asdict(rate) for key, rate in result.sets.items()},
    }
    if answers:
        entry["answers"] = [
            {
                "prompt": j.prompt.prompt,
                "class": j.prompt.label,
                "source": j.prompt.source,
                "answer": j.answer,
                "verdict": j.verdict,
            }
            for j in result.answers
        ]
    return entry
