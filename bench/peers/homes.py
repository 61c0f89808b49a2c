"""Home of a benchmark: its own registry and runs, with the downloads of the user's home."""

import os
from pathlib import Path

from trimtab import settings

TRACKING = "MLFLOW_TRACKING_URI"


def own_home(folder: Path) -> None:
    """Make a folder the home of this process and of those that it starts."""
    folder.mkdir(parents=True, exist_ok=True)
    settings.link_downloads(folder)
    os.environ["TRIMTAB_HOME"] = str(folder)
    os.environ.pop(TRACKING, None)
