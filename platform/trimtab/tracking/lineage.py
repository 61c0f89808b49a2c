"""Where something comes from: answer -> version -> run -> data, code and base model, with who made it champion, and on what
evidence."""

import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlflow.entities import Run as Logged

from trimtab import settings
from trimtab.errors import NotFoundError
from trimtab.tracking import registry
from trimtab.tracking.client import get_client, get_experiment_id, wrap_tracking_errors
from trimtab.tracking.promotions import Promotion, build_promotion_tags, list_promotions, read_decision
from trimtab.tracking.registry import Version

RUN = re.compile(r"[0-9a-f]{32}")
# A response's id is the request's, behind the name of its endpoint; a completion's choices are counted after it.
RESPONSE = re.compile(r"(?:chatcmpl|cmpl|score)-(?P<id>[\w.:-]+)")
# Params of a run that say what it was.
TELLING = ("name", "objective", "head", "place", "rows", "signals", "train.steps", "train.seed", "base_fingerprint")


@dataclass(frozen=True)
class LineageNode:
    """One thing of a chain: `facts` about it, and what it comes `of`."""

    kind: str
    title: str
    facts: Mapping[str, str] = field(default_factory=dict[str, str])
    of: Sequence["LineageNode"] = ()

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {"kind": self.kind, "title": self.title, "facts": dict(self.facts), "of": [node.as_json() for node in self.of]}


def trace_lineage(what: str, base: str, logs: Path | None = None) -> LineageNode:
    """The chain of a response's or a run's id, or of NAME, NAME@ALIAS or NAME@VERSION. Raises NotFoundError, saying where was
    looked."""
    if found := RESPONSE.fullmatch(what):
        return trace_response(found["id"], logs)
    if RUN.fullmatch(what):
        return _run_or_request(what, logs)
    name, _, ref = what.partition("@")
    if ref:
        return trace_version(registry.find_version(base, name, ref))
    try:
        return trace_version(registry.find_version(base, name))
    except NotFoundError:
        # Nothing is champion yet; or this is a request's own id.
        if any(v.name == name for v in registry.list_versions(base)):
            return trace_version(registry.find_version(base, name, registry.CANDIDATE))
        try:
            return trace_response(what, logs)
        except NotFoundError:
            pass
        raise


def trace_response(request_id: str, logs: Path | None = None) -> LineageNode:
    """The chain of an answer, by the id of its request, as long as the server's logs keep it."""
    folder = logs or settings.get_home() / "logs"
    record = _record(request_id, folder)
    if record is None:
        raise NotFoundError(f"no answer {request_id!r} in the logs in {folder}; they are kept for a time (serve --log_days)")
    base, _, prefix = str(record.get("model", "")).partition(":")
    used = [name for name in (prefix, record.get("detector")) if name]
    facts = {key: _said(record[key]) for key in ("at", "path", "status", "seconds", "tokens", "risk", "key") if key in record}
    return LineageNode("response", request_id, facts | {"model": base}, [_named(base, name) for name in used])


def trace_version(found: Version) -> LineageNode:
    """The chain of a version of a prefix or detector."""
    tags = build_promotion_tags(found)
    facts = {
        "version": str(found.version),
        "aliases": ", ".join(found.aliases) or "none",
        "digest": tags["trimtab.digest"][:16],
    }
    facts |= {name: f"{value:.3f}" for name, value in sorted(found.metrics.items())}
    became = [_move(move) for move in list_promotions(found)]
    judged = read_decision(found)
    gate = (
        [LineageNode("gate", "kept" if judged["passed"] else "broken", _facts(judged, ("said", "evidence")))] if judged else []
    )
    return LineageNode(
        found.kind, f"{found.base}:{found.name}@{found.version}", facts, [*became, *gate, trace_run(found.run_id)]
    )


def trace_run(run_id: str) -> LineageNode:
    """The chain of a run: its data, code, base model, and the run that it is part of. Raises NotFoundError."""
    with wrap_tracking_errors(f"read run {run_id}"):
        there = get_client().search_runs([get_experiment_id()], f"attributes.run_id = '{run_id}'")
    if not there:
        raise NotFoundError(f"no run {run_id} at {settings.get_shown_uri()}")
    logged = there[0]
    tags, params = logged.data.tags, logged.data.params
    facts = {"status": logged.info.status, "began": _when(logged.info.start_time), "took": _took(logged)}
    facts |= {name: value for key, value in params.items() if (name := key.removeprefix("config.")) in TELLING}
    of = [_data(entry) for entry in (logged.inputs.dataset_inputs if logged.inputs else [])]
    of += [_code(tags)] if any(key.startswith(("trimtab.code", "mlflow.source.git")) for key in tags) else []
    parent = tags.get("mlflow.parentRunId")
    of += [trace_run(parent)] if parent else []
    return LineageNode("run", f"{tags.get('trimtab.kind', 'run')} {logged.info.run_name} {run_id}", facts, of)


def _run_or_request(what: str, logs: Path | None) -> LineageNode:
    """Ids of runs and of requests look alike. A run also tells which versions it made."""
    try:
        found = trace_run(what)
    except NotFoundError:
        return trace_response(what, logs)
    with wrap_tracking_errors(f"look for what run {what} made"):
        made = get_client().search_model_versions(f"run_id = '{what}'")
    names = ", ".join(f"{v.name.removeprefix('trimtab.')}@{v.version}" for v in made)
    return LineageNode(found.kind, found.title, {**found.facts, **({"made": names} if names else {})}, found.of)


def _named(base: str, name: str) -> LineageNode:
    """What a log names, even where the registry does not know it: a server may have had a folder for one."""
    plain, _, number = name.partition("@")
    try:
        return trace_version(registry.find_version(base, plain, number))
    except NotFoundError as error:
        return LineageNode("version", f"{base}:{name}", {"missing": str(error)})


def _move(move: Promotion) -> LineageNode:
    facts = {"when": _when(int(move.at * 1000)), "by": move.by, "because": move.because}
    facts |= {"over": f"version {move.over}"} if move.over is not None else {}
    facts |= {"evidence": move.evidence} if move.evidence else {}
    return LineageNode("champion", f"{move.way}{' (forced)' if move.forced else ''}", facts)


def _data(entry: Any) -> LineageNode:
    context = next((tag.value for tag in entry.tags if tag.key == "mlflow.data.context"), "")
    rows = json.loads(entry.dataset.profile or "{}").get("rows", "?")
    return LineageNode("data", entry.dataset.name, {"for": context, "digest": entry.dataset.digest, "rows": str(rows)})


def _code(tags: Mapping[str, str]) -> LineageNode:
    revision = tags.get("mlflow.source.git.commit", "installed package")
    names = {"trimtab.code.version": "trimtab", "trimtab.code.changed": "changed files", "trimtab.code.packages": "packages"}
    return LineageNode("code", revision, {shown: tags[key] for key, shown in names.items() if key in tags})


def _record(request_id: str, folder: Path) -> dict[str, Any] | None:
    """The line of a request in a folder of logs, the newest files first."""
    for path in sorted(folder.glob("serve-*.jsonl*"), key=lambda file: -file.stat().st_mtime):
        for line in _lines(path):
            # Most lines are told apart without reading them as JSON.
            if request_id in line and (record := json.loads(line))["id"] == request_id:
                return record
    return None


def _lines(path: Path) -> Iterator[str]:
    """Whole lines: the last one may be half written."""
    with path.open(encoding="utf-8", errors="replace") as file:
        yield from (line for line in file if line.endswith("}\n"))


def _facts(source: Mapping[str, Any], names: Sequence[str]) -> dict[str, str]:
    return {name: str(source[name]) for name in names if source.get(name)}


def _said(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _when(milliseconds: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(milliseconds / 1000))


def _took(logged: Logged) -> str:
    ended = logged.info.end_time
    return f"{(ended - logged.info.start_time) / 1000:.0f} s" if ended else "not ended"
