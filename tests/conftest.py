"""What tests share: a home of their own that borrows the downloaded model, and that model's parts."""

import os
import signal
import tempfile
from collections.abc import Generator
from pathlib import Path

import pytest

from trimtab import settings

# Before anything reads them: tests keep their runs and registry apart from the user's.
_home = Path(tempfile.mkdtemp(prefix="trimtab-tests-"))
settings.lend(_home)
os.environ["TRIMTAB_HOME"] = str(_home)
os.environ.pop("MLFLOW_TRACKING_URI", None)
# Tables are as wide as they need, whatever the width of who runs the tests.
os.environ.pop("COLUMNS", None)
settings.prepare_environment()
# A runner that was started in the background ignores Ctrl-C, and so would every process that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)


# Fixtures that start a cluster, an engine or a server.
STARTS = {"cluster", "nodes", "address", "engine", "url", "server"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test for which more is started is slow without saying so."""
    for item in items:
        if STARTS.intersection(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home of its own, with what was downloaded and nothing else: no runs, no verdicts."""
    settings.lend(tmp_path)
    monkeypatch.setenv("TRIMTAB_HOME", str(tmp_path))
    # MLflow leaves the store that it was last told of in there.
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


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


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """A tiny random base model, where it does not matter what a model knows."""
    from tests import tiny

    return tiny.make(tiny.FAMILIES["llama"], tmp_path_factory.mktemp("small") / "llama")


@pytest.fixture(scope="module")
def cluster() -> Generator[None]:
    """A local Ray of two cores, for the tests of one file."""
    from trimtab.jobs.cluster import joined

    with joined(None):
        yield


@pytest.fixture(scope="session")
def three(frozen, base):
    """Three prefixes that change answers, of 1, 1 and 2 rows, each at a place of its own."""
    from tests.helpers import make_prefix

    return [
        make_prefix(frozen, base, "one", 1, "system", 1),
        make_prefix(frozen, base, "two", 1, "user", 2),
        make_prefix(frozen, base, "three", 2, "start", 3),
    ]


@pytest.fixture(scope="session")
def wanted(frozen, base, three):
    """Greedy token ids of transformers for `mixed_asks(three)`: what every engine must equal."""
    from tests.helpers import TOKENS, mixed_asks, reference

    ids = [reference(frozen, base, ask, TOKENS) for ask in mixed_asks(three)]
    plain = ids[::4]
    for number in (1, 2, 3):
        changed = sum(a != b for a, b in zip(ids[number::4], plain, strict=True))
        assert changed >= 4, "the prefixes must change the answers, or equality would prove nothing"
    return ids
