"""Command `trimtab assets`: table and download of the catalog."""

from typing import Any

from rich.table import Table

from trimtab.assets.catalog import load_catalog
from trimtab.assets.download import fetch_asset, is_downloaded
from trimtab.cli.commands import AssetsConfig
from trimtab.cli.console import ProgressBar, console


def run_assets(config: AssetsConfig) -> dict[str, Any]:
    """Print the catalog. With `config.fetch`, download all assets first."""
    catalog = load_catalog()
    if config.fetch:
        with ProgressBar("fetching", len(catalog)) as bar:
            for number, name in enumerate(catalog, 1):
                fetch_asset(name, lambda what, done, total: bar.update(bar.done, note=f"{what} {done >> 20}/{total >> 20} MiB"))
                bar.update(number, note=name)
    table = Table()
    for column in ("name", "description", "size", "license", "source", "local"):
        table.add_column(column, no_wrap=column != "description")
    for asset in catalog.values():
        local = "yes" if is_downloaded(asset) else "no"
        size = f"{asset.size / 1e6:.1f} MB" if asset.size > 1e6 else f"{asset.size / 1e3:.0f} kB" if asset.size else "?"
        table.add_row(asset.name, asset.about, size, asset.licence, str(asset.source), local)
    console.print(table)
    return {
        "assets": [
            {
                "name": a.name,
                "size": a.size,
                "licence": a.licence,
                "sha256": a.sha256,
                "here": is_downloaded(a),
            }
            for a in catalog.values()
        ]
    }
