"""What code a run was of: git revision and changes where trimtab is a checkout, and the versions of all packages."""

import hashlib
import os
import platform
import subprocess
from functools import lru_cache
from importlib.metadata import distributions, version
from pathlib import Path

# Changes that are larger are no patch that anybody reads.
MOST_PATCH = 1 << 20


@lru_cache(maxsize=1)
def get_code_tags() -> dict[str, str]:
    """Tags of a run: the version of trimtab, a digest of all packages' versions, and in a checkout git's revision and how many
    files differ from it."""
    found = {"trimtab.code.version": version("trimtab"), "trimtab.code.packages": _digest(list_packages())}
    revision = _git("rev-parse", "HEAD")
    if revision is None:
        return found
    changed = [line for line in (_git("status", "--porcelain") or "").splitlines() if line]
    found["mlflow.source.git.commit"] = revision.strip()
    return found | ({"trimtab.code.changed": str(len(changed))} if changed else {})


def format_code_version() -> str:
    """The code and the machine in one line, for a report that is read without its run."""
    known = get_code_tags()
    said = f"trimtab {known['trimtab.code.version']}"
    if revision := known.get("mlflow.source.git.commit"):
        changed = known.get("trimtab.code.changed")
        said += f", commit {revision[:12]}{f' with {changed} files changed' if changed else ''}"
    return f"{said}; Python {platform.python_version()}, {platform.machine()}, {os.cpu_count()} CPU cores"


@lru_cache(maxsize=1)
def list_packages() -> str:
    """All installed packages with their versions, a line each, as pip freezes them."""
    return "".join(sorted({f"{found.name.lower()}=={found.version}\n" for found in distributions()}))


def get_uncommitted_patch() -> str | None:
    """What differs from git's revision in a checkout; None where nothing does, there is none, or it is too much to read."""
    found = _git("diff", "HEAD")
    return found if found and len(found) <= MOST_PATCH else None


def _git(*command: str) -> str | None:
    """What git says of the checkout that trimtab is run from; None where it is installed, which may be inside another one."""
    folder = Path(__file__).parent
    tracked = ["git", "-C", str(folder), "ls-files", "--error-unmatch", Path(__file__).name]
    try:
        if subprocess.run(tracked, capture_output=True, check=False).returncode:
            return None
        done = subprocess.run(
            ["git", "-C", str(folder), *command], capture_output=True, text=True, errors="replace", check=False
        )
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
