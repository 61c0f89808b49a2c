"""Fixtures shared by all tests: home folders, base models, Ray, S3, and reference outputs."""

import os
import signal
import tempfile
from collections.abc import Generator
from pathlib import Path

import pytest
import torch

from tests.support.homes import fresh_home
from tests.support.object_store import ObjectStore
from trimtab import settings

pytest_plugins = ["tests.support.deadline", "tests.support.lanes", "tests.support.order", "tests.support.starts.plugin"]

# Set before trimtab reads the variables. Tests must not write into the user's runs and registry.
_home = Path(tempfile.mkdtemp(prefix="trimtab-tests-"))
settings.link_downloads(_home)
os.environ["TRIMTAB_HOME"] = str(_home)
os.environ.pop("MLFLOW_TRACKING_URI", None)
# Without it tables are as wide as their content, whatever the terminal of the test run.
os.environ.pop("COLUMNS", None)
# Ray lowers the priority of its workers, which would then wait for the unit tests that run beside them.
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112
settings.prepare_environment()
# A shell starts background processes with SIGINT ignored, and child processes of tests would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


# Fixtures that start a cluster, an engine or a server.
STARTS = {"cluster", "nodes", "address", "signal_engine", "small_engine", "url"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that start a service, and all failure tests, as slow. Skip those that need a GPU where there is none."""
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
        if STARTS.intersection(getattr(item, "fixturenames", ())) or "failure" in item.path.parts:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def tracking_template(tmp_path_factory):
    """MLflow database with the current schema. A copy saves the migrations, which take two seconds, in each home."""
    from trimtab.tracking.client import get_client

    database = tmp_path_factory.mktemp("mlflow-template") / "mlflow.db"
    with pytest.MonkeyPatch.context() as patch:
        # MLflow writes its store into this variable, and the context restores it.
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{database}")
        get_client().search_experiments()
    return database


@pytest.fixture
def home(tmp_path, tracking_template):
    """Home folder with the downloaded assets and an MLflow database without runs."""
    with fresh_home(tmp_path, tracking_template):
        yield tmp_path


@pytest.fixture(scope="session")
def base():
    """Default base model."""
    from trimtab.model.base_model import resolve_base_model

    return resolve_base_model("smollm2-135m")


@pytest.fixture(scope="session")
def frozen(base):
    """Default base model in fp32, with frozen weights."""
    from trimtab.model.chat_template import build_renderer
    from trimtab.model.frozen_model import FrozenModel

    return FrozenModel(base.load("fp32"), build_renderer(base, 8).first_slot)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory):
    """Tiny random base model, for tests that do not depend on its answers."""
    from tests.support import tiny_models

    return tiny_models.make_base_model(tiny_models.FAMILIES["llama"], tmp_path_factory.mktemp("tiny-base") / "llama")


@pytest.fixture(scope="session")
def undisturbed(tiny_base):
    """Vectors of a training without Ray, workers and failures, as a reference."""
    from tests.support.align_runs import train_locally

    return train_locally(tiny_base)


@pytest.fixture(scope="session")
def object_store() -> Generator[ObjectStore]:
    """S3 server. It starts before Ray, because Ray's workers get its address from their environment."""
    server = ObjectStore()
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def cluster(object_store) -> Generator[None]:
    """Local Ray cluster, shared by the tests of a session."""
    import ray

    from trimtab.ray_connection import connect_to_ray
    from trimtab.ray_patches import patch_haproxy_options

    # Server tests share this cluster, and HAProxy gets its options from the environment in which Ray started.
    patch_haproxy_options(os.environ)
    assert connect_to_ray(None, object_store.environment)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def bucket(cluster, object_store) -> Generator[str]:
    """S3 bucket that the test process and Ray's workers can access."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in object_store.environment.items():
            patch.setenv(name, value)
        yield object_store.create_bucket("trimtab-tests")


@pytest.fixture(scope="session")
def three_prefixes(frozen, base):
    """Three prefixes that change answers, of 1, 1 and 2 rows, at different positions."""
    from tests.support.factories import make_prefix

    return [
        make_prefix(frozen, base, "one", 1, "system", 1),
        make_prefix(frozen, base, "two", 1, "user", 2),
        make_prefix(frozen, base, "three", 2, "start", 3),
    ]


@pytest.fixture(scope="session")
def reference_token_ids(frozen, base, three_prefixes):
    """Greedy token ids of transformers for `build_mixed_conversations(three_prefixes)`. Every engine must give the same."""
    from tests.support.factories import TOKENS, build_mixed_conversations, generate_reference

    conversations = build_mixed_conversations(three_prefixes)
    token_ids = [generate_reference(frozen, base, conversation, TOKENS) for conversation in conversations]
    without_prefix = token_ids[::4]
    for number in (1, 2, 3):
        changed = sum(a != b for a, b in zip(token_ids[number::4], without_prefix, strict=True))
        assert changed >= 4, f"prefix {number} changes too few answers for a test of equality"
    return token_ids
