"""One server for all tests of this folder, with four prefixes and two detectors."""

from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path

import openai
import pytest

from tests.support.factories import (
    compute_reference_signals,
    make_detector,
    make_label_detector,
    make_prefix,
    make_prompt_detector,
)
from trimtab.artifacts.card import PrefixCondition
from trimtab.artifacts.prefix import Prefix, save_prefix
from trimtab.detection.detector import Detector, save_detector
from trimtab.engine.config import EngineConfig
from trimtab.generation_types import Conversation
from trimtab.model.base_model import BaseModel
from trimtab.model.chat_template import build_renderer
from trimtab.model.frozen_model import FrozenModel
from trimtab.serve.config import ServeConfig
from trimtab.serve.server import serving
from trimtab.tracking import registry, runs
from trimtab.tracking.promotions import promote_version
from trimtab.types import Side
from trimtab.util import ports

SLOTS = 4
SIDES: tuple[Side, ...] = ("above", "below")
LAYERS = (20, 29)
LABELS = ("travel", "personal/data")


@pytest.fixture(scope="package")
def registered_prefixes(
    frozen: FrozenModel,
    base: BaseModel,
    three_prefixes: list[Prefix],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Four champions, and a candidate version of the first and the fourth."""
    folder = tmp_path_factory.mktemp("prefixes")
    run = runs.start_run("test", "align", folder)
    fourth = [make_prefix(frozen, base, "four", 1, "system", seed) for seed in (5, 6)]
    for number, prefix in enumerate([*three_prefixes, fourth[0], make_prefix(frozen, base, "one", 1, "system", 4), fourth[1]]):
        version = registry.register_version(save_prefix(prefix, folder / str(number)), run.run_id)
        if number <= len(three_prefixes):
            promote_version(version, "test")
    run.finish("FINISHED")


@pytest.fixture(scope="package")
def truth_detector(frozen: FrozenModel, base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Detector:
    """Champion `truth`, which flags half of the questions. Another detector is a candidate and reads fewer layers."""
    folder = tmp_path_factory.mktemp("detectors")
    run = runs.start_run("test", "detect", folder)
    detectors = [make_detector(frozen, base, name, layers) for name, layers in (("truth", LAYERS), ("other", LAYERS[1:]))]
    for detector in detectors:
        version = registry.register_version(save_detector(detector, folder / detector.card.name), run.run_id)
        if detector.card.name == "truth":
            promote_version(version, "test")
    run.finish("FINISHED")
    return detectors[0]


@pytest.fixture(scope="package")
def guard_detector(frozen: FrozenModel, base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Detector:
    """Champion `guard`, which reads prompts and flags half of the questions; candidate `topics` has two labels."""
    folder = tmp_path_factory.mktemp("guards")
    run = runs.start_run("test", "detect", folder)
    detector = make_prompt_detector(frozen, base, "guard", LAYERS[:1])
    promote_version(registry.register_version(save_detector(detector, folder / "guard"), run.run_id), "test")
    topics = make_label_detector(frozen, base, "topics", LAYERS[:1], LABELS)
    registry.register_version(save_detector(topics, folder / "topics"), run.run_id)
    run.finish("FINISHED")
    return detector


@pytest.fixture(scope="package")
def conditional_prefixes(three_prefixes: list[Prefix], tmp_path_factory: pytest.TempPathFactory) -> None:
    """Candidates with the vectors of prefix `two`, which steer the prompts that `guard` flags, or the others.

    `refusing` steers the others, and refuses the flagged ones.
    """
    folder = tmp_path_factory.mktemp("conditional")
    run = runs.start_run("test", "align", folder)
    conditions = {f"only-{side}": PrefixCondition("guard", side) for side in SIDES}
    conditions["refusing"] = PrefixCondition("guard", "below", otherwise="refuse")
    for name, condition in conditions.items():
        card = replace(three_prefixes[1].card, name=name, condition=condition)
        registry.register_version(save_prefix(replace(three_prefixes[1], card=card), folder / name), run.run_id)
    run.finish("FINISHED")


@pytest.fixture(scope="package")
def signals_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder in which the server stores the signals of its answers."""
    return tmp_path_factory.mktemp("live") / "signals"


@pytest.fixture(scope="package")
def url(
    registered_prefixes: None,
    truth_detector: Detector,
    guard_detector: Detector,
    conditional_prefixes: None,
    signals_folder: Path,
) -> Generator[str]:
    engine = EngineConfig(num_slots=SLOTS, dtype="fp32", max_model_len=512)
    shares = {"four": {"champion": 1.0, "candidate": 1.0}}
    config = ServeConfig(port=ports.find_free_ports()[0], engine=engine, traffic=shares, shadow={"four": "candidate"})
    with serving(replace(config, keep_signals=str(signals_folder), signals_flush_s=0.5)) as url:
        yield url


@pytest.fixture(scope="package")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=120, max_retries=0)


@pytest.fixture(scope="package")
def compute_expected_risk(frozen: FrozenModel, base: BaseModel, truth_detector: Detector) -> Callable[..., float]:
    """Function that returns the risk of an answer's token ids by one transformers pass."""
    renderer = build_renderer(base, 8)
    return lambda text, ids, prefix=None: truth_detector.score_answer(
        compute_reference_signals(frozen, renderer, Conversation([{"role": "user", "content": text}], prefix), ids, LAYERS),
        LAYERS,
    )
