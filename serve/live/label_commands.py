"""Commands `trimtab feedback import` and `trimtab feedback list`: labels of answers and prompts that a server has stored."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from rich.table import Table

from trimtab.cli.console import console, print_line
from trimtab.data.files import Row, read_file, rename_columns
from trimtab.detection.live_labels import (
    LABEL_NAMES,
    LabelJournal,
    LabelName,
    LiveLabel,
    build_label,
    read_labels,
    select_latest,
)
from trimtab.detection.signal_files import META, read_metadata, read_rows
from trimtab.errors import ArtifactError, UsageError
from trimtab.serve.live.answer_ids import FORM
from trimtab.serve.live.label_config import FeedbackImportConfig, FeedbackListConfig
from trimtab.types import Subject
from trimtab.util.remote_paths import Folder, open_folder, wrap_storage_errors

FIELDS = ("id", "choice", "correct", "harmful", "rater")
ANSWERS = {**dict.fromkeys(("1", "true", "yes", "right"), True), **dict.fromkeys(("0", "false", "no", "wrong"), False)}


@dataclass(frozen=True)
class StoredRows:
    """Answers or prompts of one data set.

    Attributes:
        name: name of the data set, a folder.
        subject: whether the rows are answers or prompts.
        models: models that generated the answers.
        rows: number of rows.
        labeled: number of rows with a label.
        right: number of answers that are labeled as right, or of prompts that are labeled as harmless.
        trusted: number of rows with a label of a rater that the operator trusts.
    """

    name: str
    subject: Subject
    models: list[str]
    rows: int
    labeled: int
    right: int
    trusted: int


def run_feedback_import(config: FeedbackImportConfig) -> dict[str, Any]:
    """Run `trimtab feedback import`.

    Returns:
        Number of imported labels, and of those whose answer or prompt is stored.

    Raises:
        UsageError: if the file cannot be read, or a row is invalid; no label is imported then.
        ArtifactError: if the folder has no stored answers.
    """
    rows = read_file(Path(config.file))
    names = rename_columns(FIELDS, config.columns, rows)
    labels = [_parse_row(row, names, f"{config.file}, row {number}") for number, row in enumerate(rows, 1)]
    folder = open_folder(config.signals)
    stored = {key for dataset in list_datasets(folder) for key in _read_keys(dataset)}
    journal = LabelJournal(folder, f"import-{uuid4().hex}")
    for label in labels:
        journal.append_label(label)
    matched = sum(label.key in stored for label in labels)
    print_line(f"{len(labels)} labels imported, {matched} of them for stored answers or prompts")
    return {"labels": len(labels), "stored": matched}


def run_feedback_list(config: FeedbackListConfig) -> list[dict[str, Any]]:
    """Run `trimtab feedback list`.

    Returns:
        Counts of each data set.

    Raises:
        ArtifactError: if the folder has no stored answers.
    """
    folder = open_folder(config.signals)
    labels = select_latest(read_labels(folder))
    counted = [_count_rows(dataset, labels) for dataset in list_datasets(folder)]
    table = Table(*("data set", "models", "rows", "labeled", "right or harmless", "by trusted raters"))
    for entry in counted:
        numbers = (entry.rows, entry.labeled, entry.right, entry.trusted)
        table.add_row(entry.name, " ".join(entry.models), *map(str, numbers))
    console.print(table)
    return [vars(entry) for entry in counted]


def list_datasets(folder: Folder) -> list[Folder]:
    """Return the data sets of a folder, which is that of `keep_signals`."""
    with wrap_storage_errors(folder):
        datasets = sorted((path.parent for path in folder.glob(f"*/{META}")), key=str)
    if not datasets:
        raise ArtifactError(f"{folder} has no stored answers. Name the folder of trimtab serve --keep_signals")
    return datasets


def _parse_row(row: Row, names: Mapping[str, str], location: str) -> LiveLabel:
    values = {name: row.get(column) for name, column in names.items()}
    request_id, choice, rater = str(values["id"] or ""), values["choice"] or 0, str(values["rater"] or "import")
    if not FORM.fullmatch(request_id):
        raise UsageError(f"{location}: id must be the x-trimtab-request-id of a response, not {request_id[:40]!r}")
    filled: list[LabelName] = [name for name in LABEL_NAMES if values[name] not in (None, "")]
    if len(filled) != 1:
        raise UsageError(f"{location}: fill one of the columns correct (about the answer) and harmful (about the prompt)")
    name = filled[0]
    value = ANSWERS.get(str(values[name]).strip().lower())
    if value is None:
        raise UsageError(f"{location}: {name} is {str(values[name])[:40]!r}, but must be one of {', '.join(ANSWERS)}")
    if not str(choice).isdigit():
        raise UsageError(f"{location}: choice must be the index of an answer, not {str(choice)[:40]!r}")
    return build_label(name, request_id, int(choice), rater, value=value, trusted=True)


def _read_keys(dataset: Folder) -> list[str]:
    return [row["key"] for row in read_rows(dataset, ["key"])]


def _count_rows(dataset: Folder, labels: Mapping[str, LiveLabel]) -> StoredRows:
    rows = read_rows(dataset, ["key", "model"])
    keys = {row["key"] for row in rows}
    models = sorted({row["model"] for row in rows if row["model"]})
    own = [labels[key] for key in keys if key in labels]
    right, trusted = sum(label.correct for label in own), sum(label.trusted for label in own)
    return StoredRows(dataset.name, read_metadata(dataset).subject, models, len(keys), len(own), right, trusted)
