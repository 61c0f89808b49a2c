"""Atomic file writes, removal, and exclusive folder locks."""

import os
import shutil
import threading
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from trimtab.errors import UsageError

LOCK = ".lock"


def write_atomic(path: Path, content: str | bytes) -> None:
    """Replace a file atomically.

    Readers see the old content or the new content, never a part of it. If the write fails, for instance on a full disk or by
    Ctrl-C, the old file stays unchanged. Several threads and processes may write the same file at once; the last one wins.

    Args:
        path: file to create or replace.
        content: text (written as UTF-8) or bytes.

    Raises:
        OSError: if the file cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.part")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def remove_path(path: Path) -> None:
    """Remove a folder or a file; a missing one is ignored."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def is_locked(folder: Path) -> bool:
    """Return whether a job holds the lock of a folder."""
    if not (folder / LOCK).exists():
        return False
    try:
        with FileLock(folder / LOCK, timeout=0):
            return False
    except Timeout:
        return True


@contextmanager
def exclusive_lock(folder: Path) -> Generator[None]:
    """Hold the lock of a folder, so that no other job uses it.

    The operating system releases the lock when the process ends, even after a crash.

    Raises:
        UsageError: if another job holds the lock.
    """
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UsageError(f"{folder} is in use by another job. Wait until it ends, or stop it") from None
    try:
        yield
    finally:
        lock.release()
