"""Home of a benchmark: its own registry and runs, with the downloads of the user's home."""

import os
from functools import cache
from pathlib import Path

from trimtab import settings

HOME, TRACKING = "TRIMTAB_HOME", "MLFLOW_TRACKING_URI"


def own_home(folder: Path) -> None:
    """Make a folder the home of this process and of those that it starts; a later call replaces it."""
    folder.mkdir(parents=True, exist_ok=True)
    os.environ[HOME] = str(_find_user_home())
    settings.link_downloads(folder)
    os.environ[HOME] = str(folder)
    os.environ.pop(TRACKING, None)


@cache
def _find_user_home() -> Path:
    """Return the home before the first call of `own_home`: an earlier folder may be gone."""
    return settings.get_home()
