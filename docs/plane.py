"""Drawing of the arms on the over-refusing model, from the figures of docs/results/over-refusal.json.

python docs/plane.py docs/images/over-refusal.png
"""

import json
import sys
from pathlib import Path

from trimtab.evaluation.plotting import save_figure
from trimtab.evaluation.safety.comparison import PooledArm
from trimtab.evaluation.safety.figures import draw_figures
from trimtab.stats.intervals import Rate, compute_wilson_interval

DATA = Path(__file__).parent / "results" / "over-refusal.json"


def main() -> None:
    rows = json.loads(DATA.read_text())
    unknown = compute_wilson_interval(0, 0)
    arms = [
        PooledArm(
            row["arm"],
            (),
            *(Rate(*row[name], 0) for name in ("refusal", "compliance", "balanced")),
            unknown,
            unknown,
            unknown,
            {},
        )
        for row in rows
    ]
    figures = draw_figures({"xstest": arms}, {}, [arm.name for arm in arms])
    Path(sys.argv[1]).write_bytes(save_figure(figures["plane-xstest"], "png"))


if __name__ == "__main__":
    main()
