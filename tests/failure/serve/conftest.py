"""One server with two replicas for all tests of this folder, with its registry on an MLflow server."""

from collections.abc import Generator

import pytest

from tests.support.factories import make_prefix
from tests.support.mlflow_server import MlflowServer
from trimtab.artifacts.prefix import save_prefix
from trimtab.engine.config import EngineConfig
from trimtab.serve.config import ServeConfig
from trimtab.serve.server import serving
from trimtab.tracking import registry, runs
from trimtab.tracking.promotions import promote_version
from trimtab.util import ports


@pytest.fixture(scope="package")
def registry_mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Generator[MlflowServer]:
    """MLflow server that is the tracking server of the tests and of the replicas."""
    folder = tmp_path_factory.mktemp("mlflow")
    server = MlflowServer(f"sqlite:///{folder}/server.db", folder / "files")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", server.uri)
        server.start()
        yield server
    server.kill()


@pytest.fixture(scope="package")
def replicated_server_url(registry_mlflow_server, frozen, base, tmp_path_factory) -> Generator[str]:
    """URL of the server. It starts with two versions of the prefix `kept`, of which the first is champion."""
    folder = tmp_path_factory.mktemp("prefixes")
    run = runs.start_run("a run to be found", "align", folder / "outbox")
    for seed in (1, 2):
        prefix = make_prefix(frozen, base, "kept", 1, "system", seed)
        version = registry.register_version(save_prefix(prefix, folder / str(seed)), run.run_id)
        if seed == 1:
            promote_version(version, "test")
    run.finish("FINISHED")
    engine = EngineConfig(num_slots=8, dtype="fp32", max_model_len=512, cpu_kv_cache_gib=1)
    with serving(ServeConfig(port=ports.find_free_ports()[0], num_replicas=2, engine=engine, detect=False)) as url:
        yield url
