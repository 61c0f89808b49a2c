"""Home folders of tests."""

import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

from trimtab import settings


@contextmanager
def fresh_home(folder: Path, tracking_template: Path) -> Generator[None]:
    """Use a folder as home while the context is open: the downloaded assets, and an MLflow database without runs."""
    settings.link_downloads(folder)
    (folder / "mlflow").mkdir()
    shutil.copy(tracking_template, folder / "mlflow")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRIMTAB_HOME", str(folder))
        # MLflow writes its store into this variable: set first, so that the value before the test comes back after it.
        patch.setenv("MLFLOW_TRACKING_URI", "")
        patch.delenv("MLFLOW_TRACKING_URI")
        yield
