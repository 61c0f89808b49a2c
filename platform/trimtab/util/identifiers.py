"""Identifiers: keys that are hashed from content, references to registered versions, and names for other systems."""

import hashlib


def compute_key(content: str | bytes, length: int) -> str:
    """Compute a key of a cache or a digest of a data set.

    Args:
        content: everything that the key depends on; text is encoded as UTF-8.
        length: number of hex digits. It is part of existing files, so that each use keeps its own.

    Returns:
        The first `length` hex digits of the SHA-256.
    """
    data = content.encode() if isinstance(content, str) else content
    return hashlib.sha256(data).hexdigest()[:length]


def split_reference(reference: str) -> tuple[str, str | None]:
    """Split a reference to a version.

    Args:
        reference: NAME, NAME@alias or NAME@version.

    Returns:
        The name, and the alias or version; None if the reference has none.
    """
    name, _, version = reference.partition("@")
    return name, version or None


def sanitize_name(name: str, allowed: str = "/-_. ") -> str:
    """Replace characters that another system does not allow in names with hyphens.

    Args:
        name: name to sanitize.
        allowed: allowed characters besides letters and digits; by default those of MLflow metrics.
    """
    return "".join(c if c.isalnum() or c in allowed else "-" for c in name)
