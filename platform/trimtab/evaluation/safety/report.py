"""Results of a safety evaluation as JSON, as a terminal table and as a figure."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from trimtab.evaluation.plotting import save_figure
from trimtab.evaluation.safety.comparison import pool_arms
from trimtab.evaluation.safety.figures import draw_figures
from trimtab.evaluation.safety.results import MEASURES, ArmResult
from trimtab.stats.intervals import Rate


def results_as_json(results: Sequence[ArmResult], answers: bool = True) -> dict[str, Any]:
    """Convert results to JSON.

    Args:
        results: results of the arms.
        answers: include every judged answer.

    Returns:
        `{"arms": [{name, refusal, compliance, balanced, harmful_compliance, partial, degenerate, intervals, sets, answers}]}`.
    """
    return {"arms": [_arm_as_json(result, answers) for result in results]}


def build_table(results: Sequence[ArmResult], title: str) -> Table:
    """Build a terminal table with one row per arm and 95 % intervals."""
    table = Table(title=title, title_justify="left")
    for column in ("arm", *MEASURES.values()):
        table.add_column(column, no_wrap=True)
    for r in results:
        shares = [f"{rate.value:.2f}" for rate in (r.harmful_compliance, r.partial, r.degenerate)]
        table.add_row(r.name, str(r.refusal), str(r.compliance), str(r.balanced), *shares)
    return table


def write_plane(results: Sequence[ArmResult], path: Path) -> bool:
    """Draw the safety/helpfulness plane to a PNG file.

    Args:
        results: results of the arms.
        path: file to write.

    Returns:
        Whether the file was written: False if no arm answered both harmful and benign prompts.
    """
    figures = draw_figures({"all": pool_arms(results)}, {}, [r.name for r in results])
    for figure in figures.values():
        path.write_bytes(save_figure(figure, "png"))
    return bool(figures)


def _arm_as_json(result: ArmResult, answers: bool) -> dict[str, Any]:
    rates: dict[str, Rate] = {measure: getattr(result, measure) for measure in MEASURES}
    entry: dict[str, Any] = {
        "name": result.name,
        **{measure: rate.value for measure, rate in rates.items()},
        "intervals": {measure: [rate.low, rate.high] for measure, rate in rates.items()},
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
                "degenerate": j.degenerate,
            }
            for j in result.answers
        ]
    return entry
