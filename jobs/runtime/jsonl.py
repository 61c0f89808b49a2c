"""Files of JSON lines that are only added to, by many processes at once."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file, none where there is no file. A line that a crash cut off is as good as none."""
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue


def append_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A line break on both sides, as any line may be cut off by a crash: each costs itself only.
    text = "".join(f"\n{json.dumps(row)}\n" for row in rows)
    with FileLock(f"{path}.lock"), path.open("a") as file:
        file.write(text)
