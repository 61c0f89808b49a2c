"""Append-only JSONL files for concurrent writers."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from trimtab.util.json_files import parse_json_line


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file, none if the file does not exist; skip lines that a crash truncated."""
    yield from filter(None, map(parse_json_line, path.read_text().splitlines() if path.exists() else ()))


def append_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append rows to a file under a file lock; create the file and its folder if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Line breaks on both sides: a line that a crash truncated does not corrupt the next one.
    text = "".join(f"\n{json.dumps(row)}\n" for row in rows)
    with FileLock(f"{path}.lock"), path.open("a") as file:
        file.write(text)
