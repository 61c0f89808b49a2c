"""`trimtab lineage`: a chain as a tree in the terminal, and as a page."""

from pathlib import Path
from typing import Any

from rich.text import Text
from rich.tree import Tree

from trimtab.commands import LineageConfig
from trimtab.console import console, say
from trimtab.evaluate import templates
from trimtab.tracking import lineage
from trimtab.tracking.lineage import Node


def command(config: LineageConfig) -> dict[str, Any]:
    """Print where something comes from; write the page where asked to."""
    chain = lineage.trace(config.what, config.base, Path(config.logs) if config.logs else None)
    console.print(tree(chain))
    if config.html:
        Path(config.html).write_text(templates.render("lineage.html.jinja", title=f"Lineage of {config.what}", node=chain))
        say(f"page: {config.html}")
    return chain.as_json()


def tree(node: Node, on: Tree | None = None) -> Tree:
    """A chain with what comes first on top."""
    label = Text.assemble((node.kind, "bold"), " ", node.title)
    for name, value in node.facts.items():
        label.append(f"\n{name} ", "dim").append(value)
    branch = Tree(label) if on is None else on.add(label)
    for source in node.of:
        tree(source, branch)
    return branch
