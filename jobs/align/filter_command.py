"""The `trimtab filter` command: a preview of the hard filter, without training.

It takes the settings of `trimtab align`.
"""

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from trimtab.cli.console import console
from trimtab.data.hard_filter import FilterStep, TrainingRow
from trimtab.jobs.align.config import AlignConfig
from trimtab.jobs.align.dataset import (
    PreparedDataset,
    build_filter_table,
    count_origins,
    list_removed_rows,
    prepare_dataset,
    read_raw_dataset,
)
from trimtab.jobs.runtime.cluster import ray_session
from trimtab.model.base_model import resolve_base_model
from trimtab.types import LABELS, TargetOrigin

ORIGINS: dict[TargetOrigin, str] = {
    "given": "given by the data",
    "greedy": "greedy answer",
    "samples": "sample",
    "system_prompt": "sample under a system prompt",
    "opening": "continued opening",
    "fixed": "data.refusal",
}


def run_filter(config: AlignConfig) -> dict[str, Any]:
    """Print the filter table and examples of the rows that each rule removed.

    Generated targets are cached, so that `trimtab align` reuses them.

    Returns:
        The content of `filter_as_json`.

    Raises:
        TrimtabError: if the prompts cannot be read, the filter removes all rows, or generation fails.
    """
    base = resolve_base_model(config.base, config.revision)
    raw = read_raw_dataset(config, base)
    with ray_session(config.scale.address):
        prepared = prepare_dataset(config, base, raw)
    console.print(build_table(prepared.filtered.table))
    console.print(build_origin_table(prepared.filtered.rows))
    for rule in dict.fromkeys(rule for rule, _ in prepared.filtered.removed):
        examples = [row.prompt.prompt for r, row in prepared.filtered.removed if r == rule][:3]
        console.print(f"{rule}: {' | '.join(examples)}")
    return filter_as_json(prepared)


def build_table(steps: list[FilterStep]) -> Table:
    """Build a table with a line for each rule: rows removed and left, by class."""
    table = Table(title="hard filter", title_justify="left")
    table.add_column("rule")
    for label in LABELS:
        table.add_column(f"{label}: removed", justify="right")
        table.add_column("left", justify="right")
    for step in steps:
        counts = [text for label in LABELS for text in (str(step.removed.get(label, "")), str(step.left[label]))]
        table.add_row(step.rule, *counts)
    return table


def build_origin_table(rows: Sequence[TrainingRow]) -> Table:
    """Build a table with a line for each origin of a target: remaining rows by class."""
    table = Table(title="targets", title_justify="left")
    table.add_column("origin")
    for label in LABELS:
        table.add_column(label, justify="right")
    for origin, counts in count_origins(rows).items():
        table.add_row(ORIGINS[origin], *(str(counts[label]) for label in LABELS))
    return table


def filter_as_json(prepared: PreparedDataset) -> dict[str, Any]:
    """Return the `--json` output: the filter table, the predictability of the class from the form, and the removed rows."""
    return build_filter_table(prepared) | {"removed": list_removed_rows(prepared)}
