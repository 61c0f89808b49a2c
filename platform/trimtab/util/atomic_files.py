"""Files that are there whole or not at all, whatever ends their writer; folders that one job at a time writes."""

import os
import threading
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from trimtab.errors import UsageError

LOCK = ".lock"


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file in the place of the one that was there; where there is no room, that one stays as it is. Several threads
    and processes may do so at once: the last one's stays."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.part")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def is_locked(folder: Path) -> bool:
    """Whether a job is at work in a folder."""
    if not (folder / LOCK).exists():
        return False
    try:
        with FileLock(folder / LOCK, timeout=0):
            return False
    except Timeout:
        return True


@contextmanager
def exclusive_lock(folder: Path) -> Generator[None]:
    """Keep other jobs out of a folder; however this process ends, they may then come in.

    Raises UsageError where one is in there.
    """
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UsageError(f"another job is at work in {folder}: wait for its end, or stop it") from None
    try:
        yield
    finally:
        lock.release()
