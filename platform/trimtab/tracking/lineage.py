"""Lineage of responses, versions and runs.

A response leads to versions, a version to its promotions, its gate decision and its run, and a run to its data, code and base
model.
"""

import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any

from mlflow.entities import Run

from trimtab import settings
from trimtab.errors import NotFoundError
from trimtab.tracking import registry
from trimtab.tracking.client import get_client, get_experiment_id, wrap_tracking_errors
from trimtab.tracking.promotions import Promotion, list_promotions, list_version_tags, read_decision
from trimtab.tracking.registry import Version
from trimtab.util.identifiers import split_reference
from trimtab.util.json_files import parse_json_line

RUN = re.compile(r"[0-9a-f]{32}")
# The id of a response is the request id with a prefix for the endpoint, and a suffix that numbers the choices of a completion.
RESPONSE = re.compile(r"(?:chatcmpl|cmpl|score)-(?P<id>[\w.:-]+)")
# Params of a run that are shown in its lineage.
SHOWN_PARAMS = (
    "name",
    "objective",
    "head",
    "position",
    "num_virtual_tokens",
    "signals",
    "train.max_steps",
    # Names in runs of release 0.1.0.
    "place",
    "rows",
    "train.steps",
    "train.seed",
    "base_fingerprint",
)


@dataclass(frozen=True)
class LineageNode:
    """Node of a lineage.

    Attributes:
        kind: kind of the object, such as "response", "prefix", "run" or "data".
        title: name of the object.
        facts: properties of the object by name.
        of: nodes from which the object was derived.
    """

    kind: str
    title: str
    facts: Mapping[str, str] = field(default_factory=dict[str, str])
    of: Sequence["LineageNode"] = ()

    def as_json(self) -> dict[str, Any]:
        """Return the node and its sources as nested JSON objects."""
        return {"kind": self.kind, "title": self.title, "facts": dict(self.facts), "of": [node.as_json() for node in self.of]}


def trace_lineage(what: str, base: str, log_dir: Path | None = None) -> LineageNode:
    """Trace the lineage of an object.

    Args:
        what: id of a response, a request or a run; or NAME, NAME@ALIAS or NAME@VERSION of a prefix or detector.
        base: base model of the prefix or detector.
        log_dir: folder with the server's logs; None for the one in trimtab's home.

    Raises:
        NotFoundError: if there is no such object. The message names the searched logs or registry.
    """
    if match := RESPONSE.fullmatch(what):
        return trace_response(match["id"], log_dir)
    if RUN.fullmatch(what):
        return _trace_run_or_request(what, log_dir)
    name, ref = split_reference(what)
    if ref:
        return trace_version(registry.find_version(base, name, ref))
    try:
        return trace_version(registry.find_version(base, name))
    except NotFoundError:
        # The name has no champion yet, or `what` is the id of a request.
        if any(v.name == name for v in registry.list_versions(base)):
            return trace_version(registry.find_version(base, name, registry.CANDIDATE))
        try:
            return trace_response(what, log_dir)
        except NotFoundError:
            pass
        raise


def trace_response(request_id: str, log_dir: Path | None = None) -> LineageNode:
    """Trace the lineage of a response through the server's logs.

    Args:
        request_id: id of the request.
        log_dir: folder with the server's logs; None for the one in trimtab's home.

    Raises:
        NotFoundError: if the logs do not contain the request. Servers delete old logs (`--log_retention_days`).
    """
    folder = log_dir or settings.get_home() / "logs"
    record, count = _find_record(request_id, folder)
    if record is None:
        raise NotFoundError(
            f"no response {request_id!r} in the logs in {folder}. Old logs are deleted (serve --log_retention_days)"
        )
    base, _, prefix = str(record.get("model", "")).partition(":")
    used = [name for name in (prefix, record.get("detector")) if name]
    facts = {
        key: _format_value(record[key]) for key in ("at", "path", "status", "seconds", "tokens", "risk", "key") if key in record
    }
    if count > 1:
        facts["requests"] = f"{count} with this id; this is the newest answered one"
    return LineageNode("response", request_id, facts | {"model": base}, [_trace_logged_version(base, name) for name in used])


def trace_version(version: Version) -> LineageNode:
    """Trace the lineage of a version: its promotions, its gate decision and its run."""
    tags = list_version_tags(version)
    facts = {
        "version": str(version.version),
        "aliases": ", ".join(version.aliases) or "none",
        "digest": tags["trimtab.digest"][:16],
    }
    facts |= {name: f"{value:.3f}" for name, value in sorted(version.metrics.items())}
    promotions = [_build_promotion_node(promotion) for promotion in list_promotions(version)]
    decision = read_decision(version)
    gate = (
        [LineageNode("gate", "passed" if decision["passed"] else "failed", _select_facts(decision, ("reason", "evidence")))]
        if decision
        else []
    )
    return LineageNode(
        version.kind, f"{version.base}:{version.name}@{version.version}", facts, [*promotions, *gate, trace_run(version.run_id)]
    )


def trace_run(run_id: str, children: frozenset[str] = frozenset()) -> LineageNode:
    """Trace the lineage of a run: its data, its code and its parent run.

    Args:
        run_id: id of the run.
        children: runs that were traced on the way to this one; a parent among them is left out, because tags can form a cycle.

    Raises:
        NotFoundError: if MLflow has no such run.
    """
    with wrap_tracking_errors(f"read run {run_id}"):
        runs = get_client().search_runs([get_experiment_id()], f"attributes.run_id = '{run_id}'")
    if not runs:
        raise NotFoundError(f"no run {run_id} at {settings.get_shown_uri()}")
    run = runs[0]
    tags, params = run.data.tags, run.data.params
    facts = {"status": run.info.status, "began": _format_time(run.info.start_time), "took": _format_duration(run)}
    facts |= {name: value for key, value in params.items() if (name := key.removeprefix("config.")) in SHOWN_PARAMS}
    sources = [_build_data_node(entry) for entry in (run.inputs.dataset_inputs if run.inputs else [])]
    sources += [_build_code_node(tags)] if any(key.startswith(("trimtab.code", "mlflow.source.git")) for key in tags) else []
    parent = tags.get("mlflow.parentRunId")
    traced = children | {run_id}
    sources += [trace_run(parent, traced)] if parent and parent not in traced and RUN.fullmatch(parent) else []
    return LineageNode("run", f"{tags.get('trimtab.kind', 'run')} {run.info.run_name} {run_id}", facts, sources)


def _trace_run_or_request(what: str, log_dir: Path | None) -> LineageNode:
    """Trace a run, with the versions that it registered, or a request: their ids have the same form."""
    try:
        node = trace_run(what)
    except NotFoundError:
        return trace_response(what, log_dir)
    with wrap_tracking_errors(f"find the versions of run {what}"):
        versions = get_client().search_model_versions(f"run_id = '{what}'")
    names = ", ".join(f"{v.name.removeprefix('trimtab.')}@{v.version}" for v in versions)
    return LineageNode(node.kind, node.title, {**node.facts, **({"made": names} if names else {})}, node.of)


def _trace_logged_version(base: str, name: str) -> LineageNode:
    """Trace a version that a log names. The registry may not have it: a server can also load versions from folders."""
    plain_name, number = split_reference(name)
    try:
        return trace_version(registry.find_version(base, plain_name, number or ""))
    except NotFoundError as error:
        return LineageNode("version", f"{base}:{name}", {"missing": str(error)})


def _build_promotion_node(promotion: Promotion) -> LineageNode:
    facts = {"when": _format_time(int(promotion.at * 1000)), "by": promotion.by, "because": promotion.because}
    facts |= {"over": f"version {promotion.over}"} if promotion.over is not None else {}
    facts |= {"evidence": promotion.evidence} if promotion.evidence else {}
    return LineageNode("champion", f"{promotion.way}{' (forced)' if promotion.forced else ''}", facts)


def _build_data_node(entry: Any) -> LineageNode:
    context = next((tag.value for tag in entry.tags if tag.key == "mlflow.data.context"), "")
    rows = json.loads(entry.dataset.profile or "{}").get("rows", "?")
    return LineageNode("data", entry.dataset.name, {"for": context, "digest": entry.dataset.digest, "rows": str(rows)})


def _build_code_node(tags: Mapping[str, str]) -> LineageNode:
    revision = tags.get("mlflow.source.git.commit", "installed package")
    names = {"trimtab.code.version": "trimtab", "trimtab.code.changed": "changed files", "trimtab.code.packages": "packages"}
    return LineageNode("code", revision, {shown: tags[key] for key, shown in names.items() if key in tags})


def _find_record(request_id: str, folder: Path) -> tuple[dict[str, Any] | None, int]:
    """Find the record of a request in a folder of logs, and the number of requests with this id.

    Clients can choose ids, and send one again after an error: the newest successful request is preferred.
    """
    # The substring test skips most lines without the cost of parsing JSON.
    lines = (line for path in folder.glob("serve-*.jsonl*") for line in _read_lines(path) if request_id in line)
    records = filter(None, map(parse_json_line, lines))
    found = [record for record in records if request_id in (record.get("id"), record.get("server_id"))]
    newest = max(found, key=lambda r: (_is_answered(r), str(r.get("at"))), default=None)
    return newest, len(found)


def _is_answered(record: Mapping[str, Any]) -> bool:
    return record.get("status") == HTTPStatus.OK and bool(record.get("model"))


def _read_lines(path: Path) -> Iterator[str]:
    """Yield the complete lines of a log. The server may be writing the last one."""
    with path.open(encoding="utf-8", errors="replace") as file:
        yield from (line for line in file if line.endswith("}\n"))


def _select_facts(source: Mapping[str, Any], names: Sequence[str]) -> dict[str, str]:
    return {name: str(source[name]) for name in names if source.get(name)}


def _format_value(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _format_time(milliseconds: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(milliseconds / 1000))


def _format_duration(run: Run) -> str:
    ended = run.info.end_time
    return f"{(ended - run.info.start_time) / 1000:.0f} s" if ended else "not ended"
