"""Code version of a run: git revision, uncommitted changes and package versions."""

import os
import platform
import subprocess
from functools import lru_cache
from importlib.metadata import distributions, version
from pathlib import Path

from trimtab.util.identifiers import compute_key

# Maximum size of a logged patch in characters. Larger changes are of little use as a patch.
MAX_PATCH = 1 << 20


@lru_cache(maxsize=1)
def get_code_tags() -> dict[str, str]:
    """Return the MLflow tags that describe the code.

    Returns:
        Version of trimtab and a digest of all package versions. In a git checkout also the revision and, if there are any, the
        number of changed files.
    """
    tags = {"trimtab.code.version": version("trimtab"), "trimtab.code.packages": _digest(list_packages())}
    revision = _git("rev-parse", "HEAD")
    if revision is None:
        return tags
    changed = [line for line in (_git("status", "--porcelain") or "").splitlines() if line]
    tags["mlflow.source.git.commit"] = revision.strip()
    return tags | ({"trimtab.code.changed": str(len(changed))} if changed else {})


def format_code_version() -> str:
    """Return a one-line description of the code and the machine, for reports."""
    tags = get_code_tags()
    code = f"trimtab {tags['trimtab.code.version']}"
    if revision := tags.get("mlflow.source.git.commit"):
        changed = tags.get("trimtab.code.changed")
        code += f", commit {revision[:12]}{f' with {changed} files changed' if changed else ''}"
    return f"{code}; Python {platform.python_version()}, {platform.machine()}, {os.cpu_count()} CPU cores"


@lru_cache(maxsize=1)
def list_packages() -> str:
    """Return all installed packages with their versions, one per line, as in the output of `pip freeze`."""
    return "".join(sorted({f"{package.name.lower()}=={package.version}\n" for package in distributions()}))


def get_uncommitted_patch() -> str | None:
    """Return the uncommitted changes of the git checkout as a patch.

    Returns:
        None if there are no changes, if the code is not a checkout, or if the patch exceeds 1 Mi characters.
    """
    patch = _git("diff", "HEAD")
    return patch if patch and len(patch) <= MAX_PATCH else None


def _git(*command: str) -> str | None:
    """Run git in the checkout of trimtab and return its output, or None if trimtab is not a checkout.

    An installed package may lie inside the checkout of another project, so this file itself must be tracked.
    """
    folder = Path(__file__).parent
    tracked = ["git", "-C", str(folder), "ls-files", "--error-unmatch", Path(__file__).name]
    try:
        if subprocess.run(tracked, capture_output=True, check=False).returncode:
            return None
        result = subprocess.run(
            ["git", "-C", str(folder), *command], capture_output=True, text=True, errors="replace", check=False
        )
    except OSError:
        return None
    return result.stdout if result.returncode == 0 else None


def _digest(text: str) -> str:
    return compute_key(text, 16)
