"""Page of the results of bench/gpu.sh: python bench/peers/gpu_page.py FOLDER."""

import json
import sys
from pathlib import Path
from typing import Any

import torch


def main() -> None:
    folder = Path(sys.argv[1])
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    lines = ["# GPU", "", f"{device}, torch {torch.__version__}.", "", "| part | exit code |", "|---|---|"]
    lines += [f"| {' | '.join(line.split())} |" for line in (folder / "parts.txt").read_text().splitlines()]
    lines += ["", "| figure | value | peer | ratio | goal | met |", "|---|---|---|---|---|---|"]
    for path in sorted(folder.glob("*.json")):
        lines += [format_line(line) for line in json.loads(path.read_text())]
    (folder / "gpu.md").write_text("\n".join(lines) + "\n")
    print(folder / "gpu.md")


def format_line(line: dict[str, Any]) -> str:
    """Format a line of a report as a row of the table."""
    peer = next(iter(line["peer"].values()), None) if isinstance(line.get("peer"), dict) else None
    cells = [
        line["name"],
        f"{format_number(line['value'])} {line['unit']}",
        format_number(peer),
        format_number(line.get("ratio")),
    ]
    return f"| {' | '.join([*cells, format_number(line.get('goal')), format_met(line.get('met'))])} |"


def format_number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def format_met(met: bool | None) -> str:
    return "" if met is None else "yes" if met else "no"


if __name__ == "__main__":
    main()
