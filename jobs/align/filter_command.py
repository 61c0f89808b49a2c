"""`trimtab filter`: what the hard filter would leave, without training on it. Takes the settings of `trimtab align`."""

from typing import Any

from rich.table import Table

from trimtab.cli.console import console
from trimtab.data.hard_filter import Step
from trimtab.jobs.align import dataset
from trimtab.jobs.align.config import AlignConfig
from trimtab.jobs.align.dataset import Prepared
from trimtab.jobs.runtime.cluster import joined
from trimtab.model import base_model
from trimtab.types import LABELS


def command(config: AlignConfig) -> dict[str, Any]:
    """Print the filter's table and some of what each rule removed; targets that it samples are kept for `trimtab align`."""
    base = base_model.resolve(config.base, config.revision)
    given = dataset.read(config, base)
    with joined(config.scale.address):
        prepared = dataset.prepare(config, base, given)
    console.print(table(prepared.filtered.table))
    for rule in dict.fromkeys(rule for rule, _ in prepared.filtered.removed):
        examples = [row.prompt.prompt for r, row in prepared.filtered.removed if r == rule][:3]
        console.print(f"{rule}: {' | '.join(examples)}", markup=False)
    return as_json(prepared)


def table(steps: list[Step]) -> Table:
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


def as_json(prepared: Prepared) -> dict[str, Any]:
    """For `--json`: the table, the removed rows, and how well form tells the class."""
    return dataset.table(prepared) | {"removed": dataset.removed(prepared)}
