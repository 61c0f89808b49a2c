"""What tests share: a home of their own that borrows the downloaded model, and that model's parts."""

import os
import tempfile
from collections.abc import Generator
from pathlib import Path

import pytest

from trimtab import settings

# Before anything reads them: tests keep their runs and registry apart from the user's, and share only what was downloaded.
_shared = settings.home()
_home = Path(tempfile.mkdtemp(prefix="trimtab-tests-"))
for _name in ("assets", "models", "wheels", "engine"):
    (_shared / _name).mkdir(exist_ok=True)
    (_home / _name).symlink_to(_shared / _name)
os.environ["TRIMTAB_HOME"] = str(_home)
os.environ.pop("MLFLOW_TRACKING_URI", None)
settings.prepare_environment()


@pytest.fixture(scope="session")
def base():
    """The default base model."""
    from trimtab import base as bases

    return bases.resolve("smollm2-135m")


@pytest.fixture(scope="session")
def frozen(base):
    """The default base model in fp32, ready to take vectors."""
    from trimtab import chat
    from trimtab.steering import FrozenModel

    return FrozenModel(base.load("fp32"), chat.renderer(base, 8).first_row)


@pytest.fixture
def cluster() -> Generator[None]:
    """A local Ray of two cores, for one test."""
    from trimtab.jobs.cluster import joined

    with joined(None):
        yield
