"""`trimtab filter`: what the hard filter would leave, without training on it. Takes the settings of `trimtab align`."""

from typing import Any

from rich.table import Table

from trimtab.cli.console import console
from trimtab.data.hard_filter import FilterStep
from trimtab.jobs.align.config import AlignConfig
from trimtab.jobs.align.dataset import PreparedDataset, build_filter_table, list_removed_rows, prepare_dataset, read_raw_dataset
from trimtab.jobs.runtime.cluster import ray_session
from trimtab.model.base_model import resolve_base_model
from trimtab.types import LABELS


def run_filter(config: AlignConfig) -> dict[str, Any]:
    """Print the filter's table and some of what each rule removed; targets that it samples are kept for `trimtab align`."""
    base = resolve_base_model(config.base, config.revision)
    given = read_raw_dataset(config, base)
    with ray_session(config.scale.address):
        prepared = prepare_dataset(config, base, given)
    console.print(build_table(prepared.filtered.table))
    for rule in dict.fromkeys(rule for rule, _ in prepared.filtered.removed):
        examples = [row.prompt.prompt for r, row in prepared.filtered.removed if r == rule][:3]
        console.print(f"{rule}: {' | '.join(examples)}", markup=False)
    return filter_as_json(prepared)


def build_table(steps: list[FilterStep]) -> Table:
    """One line a rule: rows removed and left, by class."""
    shown = Table(title="hard filter", title_justify="left")
    shown.add_column("rule")
    for label in LABELS:
        shown.add_column(f"{label}: removed", justify="right")
        shown.add_column("left", justify="right")
    for step in steps:
        counts = [text for label in LABELS for text in (str(step.removed.get(label, "")), str(step.left[label]))]
        shown.add_row(step.rule, *counts)
    return shown


def filter_as_json(prepared: PreparedDataset) -> dict[str, Any]:
    """For `--json`: the table, the removed rows, and how well form tells the class."""
    return build_filter_table(prepared) | {"removed": list_removed_rows(prepared)}
