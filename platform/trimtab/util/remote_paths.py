"""Folders on local disks and on the file systems of fsspec (s3://bucket/folder, gs://, abfs://, ...)."""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from upath import UPath

from trimtab.errors import ArtifactError, TrimtabError, UsageError

Folder = Path | UPath


S3 = ("s3", "s3a")


def open_folder(where: str | Path, *, attempts: int | None = None) -> Folder:
    """Return the path object of a local path or a file system URL.

    Args:
        where: local path, or URL such as s3://bucket/folder.
        attempts: number of attempts of each request to S3, with growing pauses of up to 20 seconds; if None, the number of the
            client, which gives up after some seconds.

    Raises:
        UsageError: if the protocol is unknown or its driver is not installed. The message includes the driver's reason.
    """
    if "://" not in str(where):
        return Path(where)
    try:
        retries = {"retries": {"total_max_attempts": attempts, "mode": "standard"}}
        options: dict[str, Any] = (
            {"config_kwargs": retries} if attempts and str(where).startswith(tuple(f"{name}://" for name in S3)) else {}
        )
        folder = UPath(where, **options)
        # Loads the driver, so that a missing one is reported before the job starts its work.
        _ = folder.fs
    except (ImportError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"{where}: unsupported file system ({reason})") from error
    return folder


@contextmanager
def wrap_storage_errors(where: Folder) -> Generator[None]:
    """Convert the errors of a remote file system's driver to ArtifactError with a one-line message.

    Errors of trimtab and errors of a local path pass through unchanged.

    Args:
        where: folder that is accessed.

    Raises:
        ArtifactError: if the remote file system cannot be reached.
    """
    try:
        yield
    except TrimtabError:
        raise
    except Exception as error:
        if isinstance(where, Path):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ArtifactError(f"cannot reach {where}: {reason[:200]}") from error
