"""Commands `trimtab lineage`, `list`, `show`, `rollback` and `sync`."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from trimtab import settings
from trimtab.cli.commands import LineageConfig, ListConfig, RollbackConfig, SyncConfig, VersionConfig
from trimtab.cli.console import console, print_line
from trimtab.errors import TrackingError
from trimtab.evaluation.rendering import render_template
from trimtab.tracking import registry, server_status
from trimtab.tracking.lineage import LineageNode, trace_lineage
from trimtab.tracking.promotions import rollback_version
from trimtab.tracking.registry import Version
from trimtab.tracking.runs import TrackedRun
from trimtab.tracking.server_status import AliasStatus


def run_lineage(config: LineageConfig) -> dict[str, Any]:
    """Print a lineage as a tree. With `config.html`, also write it as an HTML page.

    Returns:
        Lineage as nested objects {kind, title, facts, of}.
    """
    node = trace_lineage(config.what, config.base, Path(config.log_dir) if config.log_dir else None)
    console.print(build_tree(node))
    if config.html:
        Path(config.html).write_text(render_template("lineage.html.jinja", title=f"Lineage of {config.what}", node=node))
        print_line(f"page: {config.html}")
    return node.as_json()


def build_tree(node: LineageNode, parent: Tree | None = None) -> Tree:
    """Build a tree for the terminal from a lineage.

    Args:
        node: root of the lineage; its sources become its branches.
        parent: tree to which the node is added; None creates a new tree.
    """
    label = Text.assemble((node.kind, "bold"), " ", node.title)
    for name, value in node.facts.items():
        label.append(f"\n{name} ", "dim").append(value)
    branch = Tree(label) if parent is None else parent.add(label)
    for source in node.of:
        build_tree(source, branch)
    return branch


# Main metric of each kind: its display name and its name in the card.
HEADLINES = {"prefix": ("balanced", "test_balanced"), "detector": ("AUROC", "test_auroc")}


def list_versions(config: ListConfig) -> dict[str, Any]:
    """Print all versions of all prefixes and detectors. With `config.live`, print the versions that a server uses.

    Raises:
        TrackingError: if the registry cannot be reached.
        JobError: if no trimtab server answers at `config.live`.
    """
    versions = registry.list_versions(config.base)
    if config.live:
        return {"live": [asdict(status) for status in _print_live(config.live, config.key, versions)]}
    if not versions:
        print_line("the registry is empty. Train a prefix (trimtab align) or a detector (trimtab detect), or run trimtab demo")
    else:
        table = Table()
        for column in ("model", "kind", "version", "aliases", "on test", "run"):
            table.add_column(column, no_wrap=True)
        for v in versions:
            label, metric = HEADLINES[v.kind]
            result = f"{label} {v.metrics[metric]:.2f}" if metric in v.metrics else "-"
            table.add_row(f"{v.base}:{v.name}", v.kind, str(v.version), ", ".join(v.aliases), result, v.run_id[:8])
        console.print(table)
    return {"versions": [asdict(v) for v in versions]}


def _print_live(url: str, key: str | None, versions: Sequence[Version]) -> list[AliasStatus]:
    statuses = server_status.list_alias_status(url, key, versions)
    table = Table(*("model", "alias", "served", "registry", "refused"))
    for status in statuses:
        served = "-" if status.live is None else str(status.live)
        table.add_row(status.model, status.alias, served, str(status.registered or "-"), status.refused or "")
    console.print(table)
    return statuses


def show_version(config: VersionConfig) -> dict[str, Any]:
    """Print the card of a version.

    Raises:
        NotFoundError: if there is no such version.
    """
    version = registry.find_version(config.base, config.name, config.version)
    card = asdict(registry.load_card(version))
    console.print_json(data={"version": version.version, "aliases": list(version.aliases), "card": card})
    return {"version": asdict(version), "card": card}


def rollback_champion(config: RollbackConfig) -> dict[str, Any]:
    """Make the previous champion the champion again.

    Raises:
        NotFoundError: if there is no champion or no previous one.
    """
    version = rollback_version(config.base, config.name)
    print_line(f"{config.base}:{config.name}: champion is version {version.version} again")
    return {"champion": version.version}


def sync_outboxes(config: SyncConfig) -> dict[str, Any]:
    """Send the pending entries of all outboxes to MLflow.

    Raises:
        TrackingError: if MLflow does not accept all entries. They stay in the outboxes.
    """
    folder = settings.get_home() / "outbox"
    pending = {path.stem: TrackedRun(path.stem, folder).flush(patient=True) for path in sorted(folder.glob("*.outbox"))}
    waiting = sum(pending.values())
    if waiting:
        raise TrackingError(f"MLflow at {settings.get_shown_uri()} did not accept {waiting} entries. They stay in {folder}")
    print_line(f"{len(pending)} runs are complete in MLflow")
    return {"runs": len(pending), "waiting": waiting}
