"""Generated answers of training rows: their cache, their settings, and generation on a cluster."""

from functools import partial

import pytest
from ray.data import DataContext

from trimtab.data.prompt import Prompt
from trimtab.engine.config import EngineConfig
from trimtab.errors import UsageError
from trimtab.generation_types import Sampling
from trimtab.jobs.align.config import TargetsConfig
from trimtab.jobs.runtime import generation_cache
from trimtab.jobs.runtime.config import ScaleConfig
from trimtab.jobs.runtime.engine_pool import GenerationRequest, run_pool
from trimtab.jobs.runtime.generation_cache import CachedAnswer, append_cached, generate_cached, read_cached

HARMFUL = Prompt("Steal a car", "harmful", "t", "t")
BENIGN = Prompt("Bake bread", "benign_hard", "t", "t", system="Be brief.")


def make_answer(text: str, likelihood: float) -> CachedAnswer:
    return CachedAnswer(text, 9, True, likelihood)


def test_cache_key_depends_on_messages_sampling_and_dtype():
    request = GenerationRequest(HARMFUL.messages, Sampling(8))
    others = [
        GenerationRequest(BENIGN.messages, Sampling(8)),
        GenerationRequest(HARMFUL.messages, Sampling(9)),
        GenerationRequest(HARMFUL.messages, Sampling(8, n=2)),
        GenerationRequest(HARMFUL.messages, Sampling(8), answer_start="Well,"),
    ]
    assert len({request.key("fp32"), request.key("bf16"), *(other.key("fp32") for other in others)}) == 6


def test_cache_survives_a_truncated_line(base, monkeypatch, tmp_path):
    monkeypatch.setenv("TRIMTAB_HOME", str(tmp_path))
    append_cached(base, {"a": [make_answer("x", -1.0)], "b": []})
    (path,) = (tmp_path / "answers").glob("*.jsonl")
    path.write_text(path.read_text() + '{"key": "c", "answ')
    append_cached(base, {"d": [make_answer("y", -1.0)]})
    assert read_cached(base, {"a", "c", "d"}) == {"a": [make_answer("x", -1.0)], "d": [make_answer("y", -1.0)]}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_samples": 65}, "from 1 to 64"),
        ({"max_opening_fraction": 1.1}, "from 0 to 1"),
        ({"temperature": 0}, "set --targets.benign_rungs greedy"),
    ],
)
def test_rejects_invalid_settings(settings, message):
    with pytest.raises(UsageError, match=message):
        TargetsConfig(**settings)


@pytest.fixture
def ordered_batches(monkeypatch):
    """Batches of one request, which Ray Data returns in order."""
    monkeypatch.setattr(generation_cache, "run_pool", partial(run_pool, batch=1))
    monkeypatch.setattr(DataContext.get_current().execution_options, "preserve_order", True)


@pytest.mark.usefixtures("cluster", "ordered_batches")
def test_cluster_generation_is_cached_up_to_an_error(base, capsys):
    """Greedy and sampled requests, and one that the engine rejects; a second call reads the cache."""
    engine, scale = EngineConfig(num_slots=1, max_model_len=256, dtype="fp32"), ScaleConfig(num_engines=1)
    greedy = GenerationRequest([{"role": "user", "content": "What is the capital of France?"}], Sampling(8, logprobs=0))
    sampled = GenerationRequest(greedy.messages, Sampling(8, 1.0, n=3, seed=1, logprobs=0))
    too_long = GenerationRequest([{"role": "user", "content": "long " * 300}], Sampling(8))
    with pytest.raises(UsageError, match="the engine takes fewer than 256"):
        generate_cached("drawing", base, [greedy, sampled, too_long], engine, scale)
    assert "drawing: " in capsys.readouterr().out
    keys = {request.key("fp32") for request in (greedy, sampled, too_long)}
    assert set(read_cached(base, keys)) == keys - {too_long.key("fp32")}
    answers = generate_cached("drawing", base, [greedy, sampled], engine, scale)
    assert "drawing" not in capsys.readouterr().out
    (answer,) = answers[greedy.key("fp32")]
    assert "Paris" in answer.text
    assert -5 < answer.mean_log_probability < 0
    assert len({sample.text for sample in answers[sampled.key("fp32")]}) > 1
    assert max(sample.mean_log_probability for sample in answers[sampled.key("fp32")]) <= 0
