"""Files that are there whole or not at all, whatever ends the process that writes them."""

from pathlib import Path


def write(path: Path, content: str | bytes) -> None:
    """Write a file in the place of the one that was there; where there is no room, that one stays as it is."""
    partial = path.with_name(f".{path.name}.part")
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    partial.replace(path)
