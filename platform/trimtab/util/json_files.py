"""Readers of small JSON files, such as cards and key files, and of lines of JSON."""

import json
from pathlib import Path
from typing import Any

from trimtab.errors import ArtifactError

MAX_BYTES = 1 << 20


def read_json_object(path: Path, what: str) -> dict[str, Any]:
    """Read the JSON object in a file.

    Args:
        path: file of at most 1 MiB.
        what: noun for error messages, such as "a card".

    Raises:
        ArtifactError: if the file is unreadable, too large, no valid JSON, or not an object.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ArtifactError(f"{path} is too large for {what}: the limit is 1 MiB")
        raw = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} is not readable JSON") from error
    if not isinstance(raw, dict):
        raise ArtifactError(f"{path} is not {what}")
    return raw


def parse_json_line(line: str | bytes) -> dict[str, Any] | None:
    """Return the JSON object in a line; None for another line, such as half of one after a power failure or on a full disk."""
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
