"""A safety evaluation as JSON, as a table for the terminal, and as a picture."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from trimtab.evaluation.plotting import save_figure
from trimtab.evaluation.safety.comparison import pool_arms
from trimtab.evaluation.safety.figures import draw_figures
from trimtab.evaluation.safety.results import ArmResult


def results_as_json(results: Sequence[ArmResult], answers: bool = True) -> dict[str, Any]:
    """`{"arms": [{name, refusal, compliance, balanced, partial, intervals, sets, answers}]}`."""
    return {"arms": [_arm_as_json(result, answers) for result in results]}


def build_table(results: Sequence[ArmResult], title: str) -> Table:
    """One line an arm, with 95 % intervals."""
    shown = Table(title=title, title_justify="left")
    for column in ("arm", "refuses harmful", "helps benign", "balanced", "partial"):
        shown.add_column(column, no_wrap=True)
    for r in results:
        shown.add_row(r.name, str(r.refusal), str(r.compliance), str(r.balanced), f"{r.partial:.2f}")
    return shown


def write_plane(results: Sequence[ArmResult], path: Path) -> bool:
    """Draw the safety/helpfulness plane into a PNG file; False, and no file, where no arm was asked prompts of both sides."""
    drawn = draw_figures({"all": pool_arms(results)}, {}, [r.name for r in results])
    for figure in drawn.values():
        path.write_bytes(save_figure(figure, "png"))
    return bool(drawn)


def _arm_as_json(result: ArmResult, answers: bool) -> dict[str, Any]:
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
