"""`trimtab lineage`: a chain as a tree in the terminal, and as a page."""

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
    """Print where something comes from; write the page where asked to."""
    chain = trace_lineage(config.what, config.base, Path(config.logs) if config.logs else None)
    console.print(build_tree(chain))
    if config.html:
        Path(config.html).write_text(render_template("lineage.html.jinja", title=f"Lineage of {config.what}", node=chain))
        print_line(f"page: {config.html}")
    return chain.as_json()


def build_tree(node: LineageNode, on: Tree | None = None) -> Tree:
    """A chain with what comes first on top."""
    label = Text.assemble((node.kind, "bold"), " ", node.title)
    for name, value in node.facts.items():
        label.append(f"\n{name} ", "dim").append(value)
    branch = Tree(label) if on is None else on.add(label)
    for source in node.of:
        build_tree(source, branch)
    return branch


# The figure of a kind that tells most, and its name in the card.
HEADLINES = {"prefix": ("balanced", "test_balanced"), "detector": ("AUROC", "test_auroc")}


def list_versions(config: ListConfig) -> dict[str, Any]:
    """Print every version of every prefix and detector, or what a server answers with."""
    found = registry.list_versions(config.base)
    if config.live:
        return {"live": [asdict(line) for line in _live(config.live, config.key, found)]}
    if not found:
        print_line(
            "nothing yet: trimtab align makes prefixes, trimtab detect makes detectors, trimtab demo shows the whole way"
        )
    else:
        table = Table()
        for column in ("model", "kind", "version", "aliases", "on test", "run"):
            table.add_column(column, no_wrap=True)
        for v in found:
            name, figure = HEADLINES[v.kind]
            shown = f"{name} {v.metrics[figure]:.2f}" if figure in v.metrics else "-"
            table.add_row(f"{v.base}:{v.name}", v.kind, str(v.version), ", ".join(v.aliases), shown, v.run_id[:8])
        console.print(table)
    return {"versions": [asdict(v) for v in found]}


def _live(url: str, key: str | None, found: Sequence[Version]) -> list[AliasStatus]:
    lines = server_status.list_alias_status(url, key, found)
    table = Table(*("model", "alias", "answers", "registry", "refused"))
    for line in lines:
        shown = "nobody" if line.live is None else str(line.live)
        table.add_row(line.model, line.alias, shown, str(line.registered or "-"), line.refused or "")
    console.print(table)
    return lines


def show_version(config: VersionConfig) -> dict[str, Any]:
    """Print a version's card."""
    version = registry.find_version(config.base, config.name, config.version)
    card = asdict(registry.load_card(version))
    console.print_json(data={"version": version.version, "aliases": list(version.aliases), "card": card})
    return {"version": asdict(version), "card": card}


def rollback_champion(config: RollbackConfig) -> dict[str, Any]:
    """Move `champion` back."""
    version = rollback_version(config.base, config.name)
    print_line(f"{config.base}:{config.name}: champion is version {version.version} again")
    return {"champion": version.version}


def sync_outboxes(config: SyncConfig) -> dict[str, Any]:
    """Send what waits in outboxes."""
    folder = settings.get_home() / "outbox"
    left = {path.stem: TrackedRun(path.stem, folder).flush(patient=True) for path in sorted(folder.glob("*.outbox"))}
    waiting = sum(left.values())
    if waiting:
        raise TrackingError(f"MLflow at {settings.get_shown_uri()} did not take {waiting} entries; they are kept")
    print_line(f"{len(left)} runs are complete in MLflow")
    return {"runs": len(left), "waiting": waiting}
