"""Promotion and rollback of champions, recorded as tags on the versions with user, time and reason."""

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal
from uuid import uuid4

from filelock import FileLock

from trimtab import settings
from trimtab.errors import NotFoundError
from trimtab.tracking import registry
from trimtab.tracking.client import get_client, wrap_tracking_errors
from trimtab.tracking.registry import CHAMPION, Version, find_champion, find_version, format_model_name, mark_used
from trimtab.tracking.runs import TrackedRun

MOVED, GATE = "trimtab.moved.", "trimtab.gate"
PromotionKind = Literal["promote", "rollback"]


@dataclass(frozen=True)
class Promotion:
    """Record of a version that became champion.

    Attributes:
        way: promotion or rollback.
        at: time in seconds since 1970.
        by: user name.
        because: reason.
        over: number of the version that was champion before; None if there was none.
        forced: whether the promotion overrode the decision of the gate.
        evidence: artifact with the evidence of the gate's decision, in the version's run.
    """

    way: PromotionKind
    at: float
    by: str
    because: str
    over: int | None = None
    forced: bool = False
    evidence: str | None = None


def promote_version(version: Version, reason: str, evidence: str | None = None, *, forced: bool = False) -> Version | None:
    """Make a version the champion.

    Args:
        version: version to promote.
        reason: reason for the record.
        evidence: artifact with the evidence of the gate's decision, in the version's run.
        forced: whether the promotion overrides the decision of the gate.

    Returns:
        Previous champion, or None if there was none.
    """
    with _lock_champion(version.base, version.name):
        previous = find_champion(version.base, version.name)
        over = previous.version if previous is not None and previous.version != version.version else None
        promotion = Promotion("promote", time.time(), settings.get_user_name(), reason, over, forced, evidence)
        _record_promotion(version, promotion)
    return previous


def rollback_version(base: str, name: str, reason: str = "trimtab rollback") -> Version:
    """Make the previous champion the champion again.

    Returns:
        New champion, that is the version that the current champion replaced.

    Raises:
        NotFoundError: if there is no champion, or if it replaced no other version.
    """
    with _lock_champion(base, name):
        current = find_version(base, name, CHAMPION)
        over = next((p.over for p in reversed(list_promotions(current)) if p.way == "promote" and p.over is not None), None)
        if over is None:
            registered = format_model_name(base, name)
            raise NotFoundError(f"{registered} version {current.version} replaced no other champion: nothing to go back to")
        previous = find_version(base, name, str(over))
        _record_promotion(previous, Promotion("rollback", time.time(), settings.get_user_name(), reason, current.version))
        return previous


def list_promotions(version: Version) -> list[Promotion]:
    """Return the promotions of a version, oldest first."""
    records = [json.loads(value) for key, value in list_version_tags(version).items() if key.startswith(MOVED)]
    return sorted((Promotion(**record) for record in records), key=lambda promotion: promotion.at)


def list_version_tags(version: Version) -> dict[str, str]:
    """Return the MLflow tags of a version."""
    registered = format_model_name(version.base, version.name)
    with wrap_tracking_errors(f"read {registered}"):
        return dict(get_client().get_model_version(registered, str(version.version)).tags)


def record_decision(version: Version, passed: bool, reason: str, evidence: Mapping[str, Any] | None = None) -> str | None:
    """Record the decision of a gate as a tag of the version.

    Args:
        version: version that the gate evaluated.
        passed: whether the version passed.
        reason: explanation of the decision.
        evidence: measurements behind the decision, which are logged as an artifact of the version's run.

    Returns:
        Name of the artifact, or None without evidence.
    """
    registered, artifact = format_model_name(version.base, version.name), None
    with wrap_tracking_errors(f"write the gate's decision on {registered}"):
        if evidence is not None:
            artifact = f"gate/version-{version.version}-{time.time_ns() // 10**6}.json"
            with TemporaryDirectory() as folder:
                path = Path(folder) / Path(artifact).name
                path.write_text(json.dumps(evidence, indent=1) + "\n")
                get_client().log_artifact(version.run_id, str(path), "gate")
        _set_tag(version, GATE, json.dumps({"passed": passed, "reason": reason[:1000], "evidence": artifact}))
    return artifact


def read_decision(version: Version) -> dict[str, Any] | None:
    """Return the latest decision of the gate on a version, or None if there is none.

    Returns:
        Object {passed, reason, evidence} as `record_decision` wrote it.
    """
    decision = list_version_tags(version).get(GATE)
    if not decision:
        return None
    record = json.loads(decision)
    # Release 0.1.0 named the reason `said`.
    return record if "reason" in record else record | {"reason": record.pop("said")}


def _lock_champion(base: str, name: str) -> FileLock:
    """Return the lock of a name, so that of two promotions from this home the second one replaces the first.

    MLflow has no conditional update: promotions from different machines in the same second may record the same predecessor.
    """
    folder = settings.get_home() / "promotions"
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / f"{format_model_name(base, name)}.lock")


def _record_promotion(version: Version, promotion: Promotion) -> None:
    registered = format_model_name(version.base, version.name)
    with wrap_tracking_errors(f"make {registered} version {version.version} champion"):
        # If the clock was set back, the record must still be the last one: a rollback reads it.
        earlier = list_promotions(version)
        at = max([promotion.at, *(before.at + 0.001 for before in earlier)])
        # Written before the alias moves: a rollback needs the record.
        record = asdict(promotion) | {"because": promotion.because[:1000], "at": at}
        _set_tag(version, f"{MOVED}{round(at * 1000)}.{uuid4().hex[:8]}", json.dumps(record))
        get_client().set_registered_model_alias(registered, CHAMPION, str(version.version))
        mark_used(registered)


def _set_tag(version: Version, key: str, value: str) -> None:
    get_client().set_model_version_tag(format_model_name(version.base, version.name), str(version.version), key, value)


def register_and_promote(folder: Path, run: TrackedRun, passed: bool, reason: str, *, promote: bool = True) -> Version:
    """Register a prefix or detector as candidate, record the gate's decision, and promote the version if it passed.

    Args:
        folder: folder of the prefix or detector.
        run: run that produced it.
        passed: whether it passed the gate.
        reason: explanation of the decision.
        promote: whether a version that passed is promoted now.

    Returns:
        New version with its current aliases.
    """
    version = registry.register_version(folder, run.run_id)
    record_decision(version, passed, reason)
    if not (passed and promote):
        return version
    promote_version(version, reason)
    run.set_tags({"trimtab.champion": str(version.version)})
    return registry.find_version(version.base, version.name, str(version.version))
