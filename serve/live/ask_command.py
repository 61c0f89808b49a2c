"""Command `trimtab feedback ask`: stored answers or prompts that are worth a label."""

import csv
import json
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

from rich.table import Table

from trimtab.cli.console import console, print_line
from trimtab.detection.live_labels import read_labels
from trimtab.detection.signal_files import read_metadata
from trimtab.errors import UsageError
from trimtab.serve.live.answer_selection import SelectedAnswer, StoredAnswer, read_answers, select_answers
from trimtab.serve.live.label_commands import list_datasets
from trimtab.serve.live.label_config import FeedbackAskConfig
from trimtab.types import Subject
from trimtab.util.remote_paths import Folder, open_folder, wrap_storage_errors

# Folder with the keys that were selected before, next to the data sets.
SELECTIONS = "selected"
# Column to fill, by subject.
LABEL_COLUMN = {"answer": "correct", "prompt": "harmful"}


def run_feedback_ask(config: FeedbackAskConfig) -> list[dict[str, Any]]:
    """Run `trimtab feedback ask`.

    Returns:
        Selected answers or prompts.

    Raises:
        UsageError: if all stored rows are labeled or were selected before.
        ArtifactError: if the folder has no stored answers.
    """
    folder = open_folder(config.signals)
    unlabeled = _read_unlabeled(folder, config.subject)
    total = sum(map(len, unlabeled.values()))
    if not total:
        reason = f"{config.signals} has no {config.subject}s to label: all are labeled or were selected"
        raise UsageError(f"{reason}. Store more {config.subject}s")
    selected: list[SelectedAnswer] = []
    remaining = min(config.count, total)
    for dataset, answers in sorted(unlabeled.items(), key=lambda entry: len(entry[1])):
        # In proportion to the traffic; what a small data set lacks is left to the larger ones.
        count = min(len(answers), round(remaining * len(answers) / max(1, total)))
        selected += select_answers(answers, dataset, count, config.reserved_fraction, config.seed)
        remaining, total = remaining - count, total - len(answers)
    column = LABEL_COLUMN[config.subject]
    rows = [_build_row(entry, column) for entry in selected]
    fields = list(rows[0])
    with wrap_storage_errors(folder):
        _record_selection(folder, [entry.answer.key for entry in selected])
    if config.out:
        _write_csv(Path(config.out), fields, rows)
        print_line(f"{len(rows)} {config.subject}s to label: fill the column {column} of {config.out}, and import it")
    shown = [name for name in fields if name != column]
    table = Table(*shown)
    for row in rows:
        table.add_row(*(str(row[name]) for name in shown))
    console.print(table)
    return rows


def _read_unlabeled(folder: Folder, subject: Subject) -> dict[Folder, list[StoredAnswer]]:
    """Read the answers or prompts of each data set that have no label and were not selected before."""
    with wrap_storage_errors(folder):
        selections = [json.loads(path.read_text())["keys"] for path in (folder / SELECTIONS).glob("*.json")]
    done = {label.key for label in read_labels(folder)} | {key for keys in selections for key in keys}
    return {
        dataset: answers
        for dataset in list_datasets(folder)
        if read_metadata(dataset).subject == subject
        and (answers := [answer for answer in read_answers(dataset) if answer.key not in done])
    }


def _record_selection(folder: Folder, keys: list[str]) -> None:
    path = folder / SELECTIONS
    if isinstance(path, Path):
        path.mkdir(exist_ok=True)
    (path / f"{uuid4().hex}.json").write_text(json.dumps({"at": time.time(), "keys": keys}))


def _build_row(entry: SelectedAnswer, column: str) -> dict[str, Any]:
    request_id, _, choice = entry.answer.key.rpartition("/")
    risk = None if entry.answer.risk is None else round(entry.answer.risk, 3)
    at = datetime.fromtimestamp(entry.answer.at, UTC).isoformat(timespec="seconds")
    about = {"id": request_id} | ({"choice": int(choice)} if column == "correct" else {}) | {column: ""}
    return about | {"model": entry.answer.model, "risk": risk, "time": at, "reason": entry.reason}


def _write_csv(path: Path, fields: Sequence[str], rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        writer.writerows(rows)
