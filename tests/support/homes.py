"""Home folders of trimtab for tests."""

import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

from trimtab import settings


@contextmanager
def fresh_home(folder: Path, tracking_template: Path) -> Generator[None]:
    """Use a folder as home inside the context, with the downloaded assets and an MLflow database without runs."""
    settings.link_downloads(folder)
    (folder / "mlflow").mkdir()
    shutil.copy(tracking_template, folder / "mlflow")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRIMTAB_HOME", str(folder))
        # MLflow writes its store into this variable. Setting it first makes `patch` restore the value from before the test.
        patch.setenv("MLFLOW_TRACKING_URI", "")
        patch.delenv("MLFLOW_TRACKING_URI")
        yield
