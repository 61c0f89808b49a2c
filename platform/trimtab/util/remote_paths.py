"""Folders of this machine, and of any file system that fsspec knows: s3://bucket/folder, gs://, abfs://, …"""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from upath import UPath

from trimtab.errors import ArtifactError, TrimtabError, UsageError

Folder = Path | UPath


def open_folder(where: str | Path) -> Folder:
    """A path, or a URL of a file system. Raises UsageError for one that nothing here speaks, with what to install."""
    if "://" not in str(where):
        return Path(where)
    try:
        found = UPath(where)
        # Made here, so that a driver that is missing is told before anything long is begun.
        _ = found.fs
    except (ImportError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"{where}: no file system of this kind here ({reason})") from error
    return found


@contextmanager
def wrap_storage_errors(where: Folder) -> Generator[None]:
    """Turn what the driver of a file system elsewhere raises, each in its own kind, into an ArtifactError of one line."""
    try:
        yield
    except TrimtabError:
        raise
    except Exception as error:
        if isinstance(where, Path):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ArtifactError(f"cannot reach {where}: {reason[:200]}") from error
