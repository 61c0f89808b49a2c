"""One server for all tests of this folder: three prefixes that change answers, and two detectors."""

from collections.abc import Generator
from pathlib import Path

import openai
import pytest

from tests.support.factories import make_detector, make_prefix
from tests.support.homes import fresh_home
from trimtab.artifacts.prefix import Prefix, save_prefix
from trimtab.detection.detector import Detector, save_detector
from trimtab.engine.config import EngineConfig
from trimtab.model.base_model import BaseModel
from trimtab.model.frozen_model import FrozenModel
from trimtab.serve.config import ServeConfig
from trimtab.serve.server import serving
from trimtab.tracking import registry, runs
from trimtab.tracking.promotions import promote_version
from trimtab.util import ports

SLOTS = 4
LAYERS = (20, 29)


@pytest.fixture(scope="package", autouse=True)
def package_home(tmp_path_factory: pytest.TempPathFactory, tracking_template: Path) -> Generator[None]:
    """Home of the server and its clients, without the versions that other tests registered."""
    with fresh_home(tmp_path_factory.mktemp("home"), tracking_template):
        yield


@pytest.fixture(scope="package")
def registered(
    package_home: None, frozen: FrozenModel, base: BaseModel, three: list[Prefix], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Four champions, and one more version of the first and the fourth that is only a candidate."""
    folder = tmp_path_factory.mktemp("prefixes")
    run = runs.start_run("test", "align", folder)
    fourth = [make_prefix(frozen, base, "four", 1, "system", seed) for seed in (5, 6)]
    for number, prefix in enumerate([*three, fourth[0], make_prefix(frozen, base, "one", 1, "system", 4), fourth[1]]):
        version = registry.register_version(save_prefix(prefix, folder / str(number)), run.run_id)
        if number <= len(three):
            promote_version(version, "test")
    run.finish("FINISHED")


@pytest.fixture(scope="package")
def watcher(package_home: None, frozen: FrozenModel, base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Detector:
    """The champion `truth`, whose risks are spread over the questions and flag half of them; another one that is only a
    candidate reads fewer layers."""
    folder = tmp_path_factory.mktemp("detectors")
    run = runs.start_run("test", "detect", folder)
    made = [make_detector(frozen, base, name, layers) for name, layers in (("truth", LAYERS), ("other", LAYERS[1:]))]
    for each in made:
        version = registry.register_version(save_detector(each, folder / each.card.name), run.run_id)
        if each.card.name == "truth":
            promote_version(version, "test")
    run.finish("FINISHED")
    return made[0]


@pytest.fixture(scope="package")
def url(registered: None, watcher: Detector) -> Generator[str]:
    engine = EngineConfig(num_slots=SLOTS, dtype="fp32", max_model_len=512)
    shares = {"four": {"champion": 1.0, "candidate": 1.0}}
    with serving(
        ServeConfig(port=ports.find_free_ports()[0], engine=engine, traffic=shares, shadow={"four": "candidate"})
    ) as url:
        yield url


@pytest.fixture(scope="package")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=120, max_retries=0)
