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
from trimtab.tracking.client import client, reachable
from trimtab.tracking.registry import CHAMPION, Version, champion, find, model_name, touch
from trimtab.tracking.runs import Run

MOVED, GATE = "trimtab.moved.", "trimtab.gate"
Way = Literal["promote", "rollback"]


@dataclass(frozen=True)
class Move:
    """A version became champion: `over` the one that was, `at` seconds since 1970. `forced`: against the gate's decision;
    `evidence` the artifact of the version's run that holds the decision."""

    way: Way
    at: float
    by: str
    because: str
    over: int | None = None
    forced: bool = False
    evidence: str | None = None


def promote(version: Version, reason: str, evidence: str | None = None, *, forced: bool = False) -> Version | None:
    """Move `champion` to a version; returns the champion before it."""
    before = champion(version.base, version.name)
    over = before.version if before is not None and before.version != version.version else None
    _move(version, Move("promote", time.time(), getpass.getuser(), reason, over, forced, evidence))
    return before


def rollback(base: str, name: str, reason: str = "trimtab rollback") -> Version:
    """Give `champion` back to the version that the present one took it from."""
    now = find(base, name, CHAMPION)
    over = next((move.over for move in reversed(moves(now)) if move.way == "promote" and move.over is not None), None)
    if over is None:
        registered = model_name(base, name)
        raise NotFoundError(f"{registered} version {now.version} took champion from no other version: nothing to go back to")
    before = find(base, name, str(over))
    _move(before, Move("rollback", time.time(), getpass.getuser(), reason, now.version))
    return before


def moves(version: Version) -> list[Move]:
    """Every time that a version became champion, the first first."""
    found = [json.loads(value) for key, value in tags(version).items() if key.startswith(MOVED)]
    return sorted((Move(**move) for move in found), key=lambda move: move.at)


def tags(version: Version) -> dict[str, str]:
    """All that MLflow keeps on a version."""
    registered = model_name(version.base, version.name)
    with reachable(f"read {registered}"):
        return dict(client().get_model_version(registered, str(version.version)).tags)


def decided(version: Version, passed: bool, said: str, evidence: Mapping[str, Any] | None = None) -> str | None:
    """Write a gate's decision on a version, and its evidence into the version's run; returns the name of that artifact."""
    registered, artifact = model_name(version.base, version.name), None
    with reachable(f"write the gate's decision on {registered}"):
        if evidence is not None:
            artifact = f"gate/version-{version.version}-{time.time_ns() // 10**6}.json"
            with TemporaryDirectory() as folder:
                path = Path(folder) / Path(artifact).name
                path.write_text(json.dumps(evidence, indent=1) + "\n")
                client().log_artifact(version.run_id, str(path), "gate")
        _tag(version, GATE, json.dumps({"passed": passed, "said": said[:1000], "evidence": artifact}))
    return artifact


def decision(version: Version) -> dict[str, Any] | None:
    """The gate's last decision {passed, said, evidence} on a version; None where none was made."""
    found = tags(version).get(GATE)
    return json.loads(found) if found else None


def _move(version: Version, move: Move) -> None:
    registered = model_name(version.base, version.name)
    with reachable(f"make {registered} version {version.version} champion"):
        # First: an alias that moved without a word could not be taken back.
        _tag(version, f"{MOVED}{int(move.at * 1000)}", json.dumps(asdict(move) | {"because": move.because[:1000]}))
        client().set_registered_model_alias(registered, CHAMPION, str(version.version))
        touch(registered)


def _tag(version: Version, key: str, value: str) -> None:
    client().set_model_version_tag(model_name(version.base, version.name), str(version.version), key, value)


def enrolled(folder: Path, run: Run, passed: bool, reason: str) -> Version:
    """Register a prefix's or a detector's folder as candidate, and promote it where it `passed`, for the `reason` given."""
    version = registry.register(folder, run.run_id)
    decided(version, passed, reason)
    if not passed:
        return version
    promote(version, reason)
    run.tags({"trimtab.champion": str(version.version)})
    return registry.find(version.base, version.name, str(version.version))
