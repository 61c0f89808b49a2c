"""What tests share: a home of their own that borrows the downloaded model, and that model's parts."""

import os
import signal
import tempfile
from collections.abc import Generator
from pathlib import Path

import pytest

from tests.support.homes import fresh_home
from tests.support.object_store import ObjectStore
from trimtab import settings

pytest_plugins = ["tests.support.starts.plugin"]

# Before anything reads them: tests keep their runs and registry apart from the user's.
_home = Path(tempfile.mkdtemp(prefix="trimtab-tests-"))
settings.link_downloads(_home)
os.environ["TRIMTAB_HOME"] = str(_home)
os.environ.pop("MLFLOW_TRACKING_URI", None)
# Tables are as wide as they need, whatever the width of who runs the tests.
os.environ.pop("COLUMNS", None)
settings.prepare_environment()
# A runner that was started in the background ignores Ctrl-C, and so would every process that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)


# Fixtures that start a cluster, an engine or a server.
STARTS = {"cluster", "nodes", "address", "engine", "url", "server", "undisturbed"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that start a service, and all failure tests, as slow."""
    for item in items:
        if STARTS.intersection(getattr(item, "fixturenames", ())) or "failure" in item.path.parts:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def tracking_template(tmp_path_factory):
    """MLflow database with the current schema. A copy saves each home the migrations, which take two seconds."""
    from trimtab.tracking.client import get_client

    database = tmp_path_factory.mktemp("mlflow-template") / "mlflow.db"
    with pytest.MonkeyPatch.context() as patch:
        # MLflow writes its store into this variable: what is set here is undone with the context.
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{database}")
        get_client().search_experiments()
    return database


@pytest.fixture
def home(tmp_path, tracking_template):
    """Home folder with the downloaded assets and an empty MLflow database: no runs, no verdicts."""
    with fresh_home(tmp_path, tracking_template):
        yield tmp_path


@pytest.fixture(scope="session")
def base():
    """The default base model."""
    from trimtab.model.base_model import resolve_base_model

    return resolve_base_model("smollm2-135m")


@pytest.fixture(scope="session")
def frozen(base):
    """The default base model in fp32, ready to take vectors."""
    from trimtab.model.chat_template import build_renderer
    from trimtab.model.frozen_model import FrozenModel

    return FrozenModel(base.load("fp32"), build_renderer(base, 8).first_slot)


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """A tiny random base model, where it does not matter what a model knows."""
    from tests.support import tiny_models

    return tiny_models.make(tiny_models.FAMILIES["llama"], tmp_path_factory.mktemp("small") / "llama")


@pytest.fixture(scope="session")
def undisturbed(cluster, small, tmp_path_factory):
    """Vectors that one worker learns when nothing disturbs it: the reference of other numbers of workers and of failures."""
    from tests.support.align_runs import train

    vectors, _ = train(small, tmp_path_factory.mktemp("undisturbed"), workers=1)
    return vectors


@pytest.fixture(scope="session")
def object_store() -> Generator[ObjectStore]:
    """S3 server. It starts before Ray, whose workers take its address from their environment."""
    server = ObjectStore()
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def cluster(object_store) -> Generator[None]:
    """Local Ray, one for all tests of a session."""
    import ray

    from trimtab.ray_connection import connect_to_ray
    from trimtab.ray_patches import patch_haproxy_options

    # The tests of the server share this Ray, and its HAProxy takes the options from the environment that Ray started with.
    patch_haproxy_options(os.environ)
    assert connect_to_ray(None, object_store.environment)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def bucket(cluster, object_store) -> Generator[str]:
    """S3 bucket that this process and Ray's workers reach."""
    import boto3

    with pytest.MonkeyPatch.context() as patch:
        for name, value in object_store.environment.items():
            patch.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket="trimtab-tests")
        yield "s3://trimtab-tests"


@pytest.fixture(scope="session")
def three(frozen, base):
    """Three prefixes that change answers, of 1, 1 and 2 rows, each at a place of its own."""
    from tests.support.factories import make_prefix

    return [
        make_prefix(frozen, base, "one", 1, "system", 1),
        make_prefix(frozen, base, "two", 1, "user", 2),
        make_prefix(frozen, base, "three", 2, "start", 3),
    ]


@pytest.fixture(scope="session")
def wanted(frozen, base, three):
    """Greedy token ids of transformers for `mixed_asks(three)`: what every engine must equal."""
    from tests.support.factories import TOKENS, mixed_asks, reference

    ids = [reference(frozen, base, ask, TOKENS) for ask in mixed_asks(three)]
    plain = ids[::4]
    for number in (1, 2, 3):
        changed = sum(a != b for a, b in zip(ids[number::4], plain, strict=True))
        assert changed >= 4, "the prefixes must change the answers, or equality would prove nothing"
    return ids
