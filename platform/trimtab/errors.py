"""Exception types that trimtab raises on purpose.

All types derive from `TrimtabError`, also derive from the standard library type of the same kind, and can be pickled, because
they cross Ray process boundaries. A message is one line that states what failed, where, and what to do. `exit_code` is the exit
status of the command line; `http_status` is the status code of the server.
"""

import errno
import os


class TrimtabError(Exception):
    """Base class of all trimtab errors. Exit code 1, HTTP 500."""

    exit_code = 1
    http_status = 500


class UsageError(TrimtabError, ValueError):
    """Invalid option, file, column or request. Exit code 2, HTTP 400."""

    exit_code = 2
    http_status = 400


class TooLargeError(UsageError):
    """Request that exceeds the size limit of the server. HTTP 413."""

    http_status = 413


class NotFoundError(TrimtabError, LookupError):
    """Unknown name of a model, prefix, version, alias or asset. Exit code 2, HTTP 404."""

    exit_code = 2
    http_status = 404

    def __str__(self) -> str:
        # LookupError shows the repr of its argument, which is hard to read in a message.
        return str(self.args[0]) if self.args else ""


class ForbiddenError(TrimtabError, PermissionError):
    """Model that the API key of a request does not allow. HTTP 403."""

    http_status = 403


class ArtifactError(TrimtabError, ValueError):
    """Prefix, detector or card that is damaged, unsafe, or made for another base model. Exit code 2, HTTP 422."""

    exit_code = 2
    http_status = 422


class AssetError(TrimtabError, OSError):
    """Download that failed or did not match its checksum. HTTP 503."""

    http_status = 503


class BusyError(TrimtabError, RuntimeError):
    """All capacity for the request is in use; the client can retry later. HTTP 503."""

    http_status = 503


class TrackingError(TrimtabError, ConnectionError):
    """Tracking server that does not answer or rejects a request. HTTP 503."""

    http_status = 503


class NoSpaceError(TrimtabError, OSError):
    """Full disk. HTTP 503."""

    http_status = 503


class IncompatibleLibraryError(TrimtabError, RuntimeError):
    """Version of vLLM or Ray in which a replaced symbol has changed."""


class JobError(TrimtabError, RuntimeError):
    """Job on the cluster that ended without a result."""


class DivergedError(JobError):
    """Training whose loss or gradient is no longer finite; a restart from the checkpoint would end in the same way."""


class InterruptedByUserError(TrimtabError):
    """Interruption by the user; finished work is kept and can be resumed. Exit code 130, as in shells."""

    exit_code = 130


def as_no_space_error(error: BaseException) -> NoSpaceError | None:
    """Return a `NoSpaceError` if a full disk caused `error`, else None.

    The check also searches the messages in the exception chain, because libraries wrap the system error in their own types.
    """
    message = os.strerror(errno.ENOSPC)
    current: BaseException | None = error
    while current is not None:
        if getattr(current, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or message in str(current):
            location = f" for {current.filename}" if isinstance(current, OSError) and current.filename else ""
            return NoSpaceError(
                f"the disk is full{location}: free some space and run the command again; finished work is kept (--resume)"
            )
        current = current.__cause__ or current.__context__
    return None
