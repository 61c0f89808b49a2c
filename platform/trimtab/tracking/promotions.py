"""Who becomes champion, and who it was before: every move of the alias stays on the version, with who, when and why."""

import getpass
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from trimtab.errors import NotFoundError
from trimtab.tracking import registry
from trimtab.tracking.client import get_client, wrap_tracking_errors
from trimtab.tracking.registry import CHAMPION, Version, find_champion, find_version, format_model_name, mark_used
from trimtab.tracking.runs import TrackedRun

MOVED, GATE = "trimtab.moved.", "trimtab.gate"
PromotionKind = Literal["promote", "rollback"]


@dataclass(frozen=True)
class Promotion:
    """A version became champion: `over` the one that was, `at` seconds since 1970. `forced`: against the gate's decision;
    `evidence` the artifact of the version's run that holds the decision."""

    way: PromotionKind
    at: float
    by: str
    because: str
    over: int | None = None
    forced: bool = False
    evidence: str | None = None


def promote_version(version: Version, reason: str, evidence: str | None = None, *, forced: bool = False) -> Version | None:
    """Move `champion` to a version; returns the champion before it."""
    before = find_champion(version.base, version.name)
    over = before.version if before is not None and before.version != version.version else None
    _record_promotion(version, Promotion("promote", time.time(), getpass.getuser(), reason, over, forced, evidence))
    return before


def rollback_version(base: str, name: str, reason: str = "trimtab rollback") -> Version:
    """Give `champion` back to the version that the present one took it from."""
    now = find_version(base, name, CHAMPION)
    over = next((move.over for move in reversed(list_promotions(now)) if move.way == "promote" and move.over is not None), None)
    if over is None:
        registered = format_model_name(base, name)
        raise NotFoundError(f"{registered} version {now.version} took champion from no other version: nothing to go back to")
    before = find_version(base, name, str(over))
    _record_promotion(before, Promotion("rollback", time.time(), getpass.getuser(), reason, now.version))
    return before


def list_promotions(version: Version) -> list[Promotion]:
    """Every time that a version became champion, the first first."""
    found = [json.loads(value) for key, value in build_promotion_tags(version).items() if key.startswith(MOVED)]
    return sorted((Promotion(**move) for move in found), key=lambda move: move.at)


def build_promotion_tags(version: Version) -> dict[str, str]:
    """All that MLflow keeps on a version."""
    registered = format_model_name(version.base, version.name)
    with wrap_tracking_errors(f"read {registered}"):
        return dict(get_client().get_model_version(registered, str(version.version)).tags)


def record_decision(version: Version, passed: bool, said: str, evidence: Mapping[str, Any] | None = None) -> str | None:
    """Write a gate's decision on a version, and its evidence into the version's run; returns the name of that artifact."""
    registered, artifact = format_model_name(version.base, version.name), None
    with wrap_tracking_errors(f"write the gate's decision on {registered}"):
        if evidence is not None:
            artifact = f"gate/version-{version.version}-{time.time_ns() // 10**6}.json"
            with TemporaryDirectory() as folder:
                path = Path(folder) / Path(artifact).name
                path.write_text(json.dumps(evidence, indent=1) + "\n")
                get_client().log_artifact(version.run_id, str(path), "gate")
        _set_tag(version, GATE, json.dumps({"passed": passed, "said": said[:1000], "evidence": artifact}))
    return artifact


def read_decision(version: Version) -> dict[str, Any] | None:
    """The gate's last decision {passed, said, evidence} on a version; None where none was made."""
    found = build_promotion_tags(version).get(GATE)
    return json.loads(found) if found else None


def _record_promotion(version: Version, move: Promotion) -> None:
    registered = format_model_name(version.base, version.name)
    with wrap_tracking_errors(f"make {registered} version {version.version} champion"):
        # First: an alias that moved without a word could not be taken back.
        _set_tag(version, f"{MOVED}{int(move.at * 1000)}", json.dumps(asdict(move) | {"because": move.because[:1000]}))
        get_client().set_registered_model_alias(registered, CHAMPION, str(version.version))
        mark_used(registered)


def _set_tag(version: Version, key: str, value: str) -> None:
    get_client().set_model_version_tag(format_model_name(version.base, version.name), str(version.version), key, value)


def register_and_promote(folder: Path, run: TrackedRun, passed: bool, reason: str) -> Version:
    """Register a prefix's or a detector's folder as candidate, and promote it where it `passed`, for the `reason` given."""
    version = registry.register_version(folder, run.run_id)
    record_decision(version, passed, reason)
    if not passed:
        return version
    promote_version(version, reason)
    run.set_tags({"trimtab.champion": str(version.version)})
    return registry.find_version(version.base, version.name, str(version.version))
