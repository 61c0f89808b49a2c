"""Every error that trimtab raises on purpose: one line that says what is wrong, where, and what to do.

All share one root, each also is the standard library's type for its kind, and all pickle (they cross Ray's process
borders). `exit_code` is what the command line ends with; `http_status` what the server answers.
"""

import errno
import os


class TrimtabError(Exception):
    """Root of all. Exit code 1: the work could not be done."""

    exit_code = 1
    http_status = 500


class UsageError(TrimtabError, ValueError):
    """The caller asked for something that cannot be: a bad option, file, column or request. Exit code 2."""

    exit_code = 2
    http_status = 400


class TooLargeError(UsageError):
    """A request that is larger than the server reads. HTTP 413."""

    http_status = 413


class NotFoundError(TrimtabError, LookupError):
    """A name that does not exist: a model, prefix, version, alias or asset. Exit code 2, HTTP 404."""

    exit_code = 2
    http_status = 404

    def __str__(self) -> str:
        # LookupError shows the repr of its argument; people read this line.
        return str(self.args[0]) if self.args else ""


class ArtifactError(TrimtabError, ValueError):
    """A prefix, detector or card that must not be used: damaged, unsafe, or made for another base model."""

    exit_code = 2
    http_status = 422


class AssetError(TrimtabError, OSError):
    """A download that failed or did not match its checksum."""

    http_status = 503


class BusyError(TrimtabError, RuntimeError):
    """Everything that could serve this is in use; try again later. HTTP 503."""

    http_status = 503


class TrackingError(TrimtabError, ConnectionError):
    """The tracking server does not answer, or refuses."""

    http_status = 503


class NoSpaceError(TrimtabError, OSError):
    """A disk is full."""

    http_status = 503


class IncompatibleLibraryError(TrimtabError, RuntimeError):
    """A version of vLLM or Ray whose replaced symbols have changed."""


class JobError(TrimtabError, RuntimeError):
    """A job on the cluster ended without its result."""


class InterruptedByUserError(TrimtabError):
    """The user stopped the work; what was done is kept and can be resumed. Exit code 130, as shells have it."""

    exit_code = 130


def as_no_space_error(error: BaseException) -> NoSpaceError | None:
    """What to say where a full disk is behind an error, or None. By its text too: libraries put the system's error into one of
    their own."""
    said = os.strerror(errno.ENOSPC)
    seen: BaseException | None = error
    while seen is not None:
        if getattr(seen, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or said in str(seen):
            where = f" for {seen.filename}" if isinstance(seen, OSError) and seen.filename else ""
            return NoSpaceError(f"the disk is full{where}: make room and run it again; what was finished is kept (--resume)")
        seen = seen.__cause__ or seen.__context__
    return None
