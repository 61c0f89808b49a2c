"""One server for all tests of this folder: three prefixes that change answers, and two detectors."""

import socket
from collections.abc import Generator
from dataclasses import replace

import openai
import pytest
import torch
from trimtab.serve.config import ServeConfig
from trimtab.serve.server import serving

from tests.helpers import QUESTIONS, make_prefix, one_pass, reference
from trimtab import chat, detector, heads
from trimtab import prefix as prefixes
from trimtab.answers import Ask
from trimtab.base import BaseModel
from trimtab.detector import Detector, DetectorCard
from trimtab.engine.config import EngineConfig
from trimtab.prefix import Prefix
from trimtab.steering import FrozenModel
from trimtab.tracking import registry, runs

ROWS = 4
LAYERS = (20, 29)


@pytest.fixture(scope="package")
def registered(frozen: FrozenModel, base: BaseModel, three: list[Prefix], tmp_path_factory: pytest.TempPathFactory) -> None:
    """Three champions, and one more version of the first that is only a candidate."""
    folder = tmp_path_factory.mktemp("prefixes")
    run = runs.start("test", "align", folder)
    for number, prefix in enumerate([*three, make_prefix(frozen, base, "one", 1, "system", 4)]):
        version = registry.register(prefixes.save(prefix, folder / str(number)), run.run_id)
        if number < len(three):
            registry.promote(version, "test")
    run.finish("FINISHED")


@pytest.fixture(scope="package")
def watcher(frozen: FrozenModel, base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Detector:
    """The champion `truth`, whose risks are spread over the questions and flag half of them; another one that is only a
    candidate reads fewer layers."""
    folder = tmp_path_factory.mktemp("detectors")
    run = runs.start("test", "detect", folder)
    made = [made_detector(frozen, base, name, layers) for name, layers in (("truth", LAYERS), ("other", LAYERS[1:]))]
    for each in made:
        version = registry.register(detector.save(each, folder / each.card.name), run.run_id)
        if each.card.name == "truth":
            registry.promote(version, "test")
    run.finish("FINISHED")
    return made[0]


def made_detector(frozen: FrozenModel, base: BaseModel, name: str, layers: tuple[int, ...]) -> Detector:
    """A random head, calibrated so that the questions' answers have risks around a half."""
    torch.manual_seed(0)
    settings = {"groups": 4, "projection": 16, "hidden": 32}
    head = heads.get("flag")(base.width, len(layers), **settings)
    renderer = chat.renderer(base, 8)
    asks = [Ask([{"role": "user", "content": question}]) for question in QUESTIONS]
    seen = [one_pass(frozen, renderer, ask, reference(frozen, base, ask, 10), layers) for ask in asks]
    normaliser = torch.stack([torch.zeros(7), torch.ones(7)])
    card = DetectorCard(name, base.name, base.fingerprint, list(layers), base.width, "flag", settings, -2.0, {})
    # So flat that no risk is 0 or 1.
    raw = detector.make(head, normaliser, torch.tensor([1e-3, 0.0]), card)
    score = -1e3 * torch.tensor([raw.risk_of(each, layers) for each in seen]).logit()
    calibration = torch.stack([1 / score.std(), -score.mean() / score.std()])
    middle = detector.make(head, normaliser, calibration, card)
    risks = torch.tensor([middle.risk_of(each, layers) for each in seen])
    thresholds = {key: float(risks.median()) + 1e-3 for key in ("0.01", "0.05", "0.1")}
    return detector.make(head, normaliser, calibration, replace(card, thresholds=thresholds))


@pytest.fixture(scope="package")
def url(registered: None, watcher: Detector) -> Generator[str]:
    engine = EngineConfig(rows=ROWS, precision="fp32", max_length=512)
    with serving(ServeConfig(port=free_port(), engine=engine)) as url:
        yield url


@pytest.fixture(scope="package")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=120, max_retries=0)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
