"""Command `trimtab feedback prompts`: prompts whose answers were labeled as wrong, as training data of a prefix.

trimtab stores no text. The prompts come from a file of the operator, and are joined with the labels by their ids.
"""

import json
from pathlib import Path
from typing import Any

from trimtab.cli.console import print_line
from trimtab.data.files import read_file, rename_columns
from trimtab.detection.live_labels import read_labels, select_latest
from trimtab.errors import UsageError
from trimtab.serve.live.label_config import FeedbackPromptsConfig
from trimtab.util.atomic_files import write_atomic
from trimtab.util.remote_paths import open_folder

FIELDS = ("id", "prompt", "system")


def run_feedback_prompts(config: FeedbackPromptsConfig) -> dict[str, Any]:
    """Run `trimtab feedback prompts`.

    Returns:
        Number of rows of the file, and of those that were written.

    Raises:
        UsageError: if the file cannot be read, a row has no id or prompt, or no prompt has a matching label.
        ArtifactError: if remote storage cannot be reached.
    """
    rows = read_file(Path(config.file))
    names = rename_columns(FIELDS, config.columns, rows)
    labels = [label for label in read_labels(open_folder(config.signals)) if label.trusted or not config.trusted]
    wrong = {label.id for label in select_latest(labels).values() if not label.correct}
    selected: dict[str, dict[str, str]] = {}
    for number, row in enumerate(rows, 1):
        values = {name: str(row.get(column) or "") for name, column in names.items()}
        if not values["id"] or not values["prompt"]:
            raise UsageError(f"{config.file}, row {number}: no id or prompt. Add both, or remove the row")
        if values["id"] in wrong:
            system = {"system": values["system"]} if values.get("system") else {}
            selected[json.dumps([values["prompt"], values.get("system")])] = {
                "prompt": values["prompt"],
                "class": config.label,
                "source": "feedback",
                **system,
            }
    if not selected:
        who = "trusted raters" if config.trusted else "raters"
        raise UsageError(f"{config.file}: none of {len(rows)} answers was labeled as wrong by {who}. Label them first")
    write_atomic(Path(config.out), "".join(json.dumps(row) + "\n" for row in selected.values()))
    print_line(f"{len(selected)} of {len(rows)} prompts written to {config.out} as {config.label}")
    return {"rows": len(rows), "written": len(selected)}
