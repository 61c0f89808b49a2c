"""Keeping what a job made: a version in the registry, and champion where it passed its gate."""

from pathlib import Path

from trimtab.tracking import promotions, registry
from trimtab.tracking.registry import Version
from trimtab.tracking.runs import Run


def enrolled(folder: Path, run: Run, passed: bool, reason: str) -> Version:
    """Register a prefix's or a detector's folder as candidate, and promote it where it `passed`, for the `reason` given."""
    version = registry.register(folder, run.run_id)
    promotions.decided(version, passed, reason)
    if not passed:
        return version
    promotions.promote(version, reason)
    run.tags({"trimtab.champion": str(version.version)})
    return registry.find(version.base, version.name, str(version.version))
