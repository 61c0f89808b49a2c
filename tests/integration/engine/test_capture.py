"""Signals captured in the engine are those of one transformers pass over the same text, whatever the engine does on its way."""

import pytest
import torch

from tests.support.factories import make_detector, make_prefix, one_pass
from trimtab.engine.config import EngineConfig
from trimtab.engine.offline import Engine
from trimtab.errors import UsageError
from trimtab.generation_types import Answer, Conversation, Sampling

LAYERS = (20, 29)
SHORT = [f"What is the capital of {name}?" for name in ("France", "Spain", "Japan", "Peru", "Chad", "Cuba", "Mali", "Laos")]
LONG = [f"I {'really ' * count}want to know what bread is. Number {count}." for count in (20, 60, 100)]


@pytest.fixture(scope="module")
def engine(base):
    """Small steps, so that prompts come in pieces; few blocks, so that requests are preempted; few slots, each used again."""
    config = EngineConfig(
        num_slots=8,
        dtype="fp32",
        max_model_len=256,
        max_num_seqs=6,
        max_num_batched_tokens=48,
        num_gpu_blocks_override=14,
        layers=LAYERS,
        token_statistics=True,
    )
    with Engine(base, config) as started:
        yield started


def check(engine: Engine, frozen, asks: list[Conversation], answers: list[list[Answer]]) -> None:
    for ask, several in zip(asks, answers, strict=True):
        for answer in several:
            assert answer.signals is not None
            seen = one_pass(frozen, engine.renderer, ask, answer.token_ids, LAYERS)
            assert (answer.signals.psi - seen.psi).norm() / seen.psi.norm() < 1e-3
            torch.testing.assert_close(answer.signals.history, seen.history, rtol=1e-3, atol=2e-3)


def asked(*questions: str, prefix=None) -> list[Conversation]:
    return [Conversation([{"role": "user", "content": question}], prefix) for question in questions]


def test_mixed_requests_in_flight_cold_and_from_the_prefix_cache(engine, frozen, base, monkeypatch):
    """In chunks, preempted, with and without a prefix, of lengths that end in and at a block's edge; then once more, cached."""
    scheduler, preempted = engine._llm.llm_engine.engine_core.engine_core.scheduler, []
    preempt = scheduler._preempt_request
    monkeypatch.setattr(scheduler, "_preempt_request", lambda *a, **k: preempted.append(preempt(*a, **k)))
    steered = make_prefix(frozen, base, "p", 2, "system", 1)
    asks = [*asked(*SHORT, *LONG), *asked(*SHORT[:4], prefix=steered)]
    for _ in range(2):
        check(engine, frozen, asks, engine.chat_many(asks, Sampling(max_tokens=60)))
    assert preempted, "nothing was preempted: the test shows less than it says"


def test_a_later_turn_finds_the_answer_of_the_first_in_the_cache(engine, frozen):
    """Blocks that one request wrote as an answer are read by another as its prompt."""
    first = asked(LONG[0])
    ((answer,),) = engine.chat_many(first, Sampling(max_tokens=40))
    turns = [*first[0].messages, {"role": "assistant", "content": answer.text}, {"role": "user", "content": "Go on."}]
    check(engine, frozen, [Conversation(turns)], engine.chat_many([Conversation(turns)], Sampling(max_tokens=8)))


def test_each_of_several_seeded_samples_has_its_own(engine, frozen):
    """Also where a prompt comes in pieces, and the same again for the seed, as nothing of that may show."""
    asks = asked(*SHORT[:3], LONG[2])
    sampling = Sampling(max_tokens=10, temperature=1.0, n=3, seed=1)
    answers = engine.chat_many(asks, sampling)
    check(engine, frozen, asks, answers)
    again = engine.chat_many(asks, sampling)
    assert [[a.text for a in several] for several in again] == [[a.text for a in several] for several in answers]


def test_an_answer_of_one_token(engine, frozen):
    asks = asked(SHORT[0])
    check(engine, frozen, asks, engine.chat_many(asks, Sampling(max_tokens=1)))


def test_sampling_settings_do_not_change_what_is_read(engine, frozen):
    """Temperature, penalties and log-probs of a request leave the model's own distribution as it is."""
    asks = asked(*SHORT[:2])
    check(
        engine, frozen, asks, engine.chat_many(asks, Sampling(max_tokens=10, temperature=1.5, repetition_penalty=1.3, seed=2))
    )


def test_answers_that_someone_else_wrote(engine, frozen, base):
    """Read in pieces beside each other: the same as one pass, and as what the model showed when it wrote one itself."""
    steered = make_prefix(frozen, base, "p", 2, "system", 1)
    asks = [*asked(*SHORT, *LONG), *asked(*SHORT[:4], prefix=steered), *asked(SHORT[0])]
    texts = ["Paris.", "", "I do not know " * 20, *["It is a town by the sea."] * (len(asks) - 4), "Paris. " * 200]
    answers = engine.score_many(asks, texts)
    check(engine, frozen, asks, [[answer] for answer in answers])
    assert [answer.finish_reason for answer in answers] == ["stop"] * (len(asks) - 1) + ["length"]
    assert [len(answer.token_ids) for answer in answers[:2]] == [3, 1]


def test_reading_an_answer_shows_what_writing_it_did(engine):
    asks = asked(*SHORT)
    written = [several[0] for several in engine.chat_many(asks, Sampling(max_tokens=60))]
    whole = [(ask, answer) for ask, answer in zip(asks, written, strict=True) if answer.finish_reason == "stop"]
    assert whole, "no answer ended by itself"
    read = engine.score_many([ask for ask, _ in whole], [answer.text for _, answer in whole])
    same = [(w, r.signals) for (_, w), r in zip(whole, read, strict=True) if r.token_ids == w.token_ids]
    assert same, "no text was read in the tokens that it was written in"
    for answer, signals_read in same:
        assert (signals_read.psi - answer.signals.psi).norm() / answer.signals.psi.norm() < 1e-3
        torch.testing.assert_close(signals_read.history, answer.signals.history, rtol=1e-3, atol=2e-3)


def test_an_answer_has_the_risk_that_a_detector_gives(engine, frozen, base):
    watcher = make_detector(frozen, base, "truth", LAYERS)
    messages = [{"role": "user", "content": SHORT[0]}]
    answer = engine.chat(messages, sampling=Sampling(max_tokens=12), detector=watcher)
    seen = one_pass(frozen, engine.renderer, Conversation(messages), answer.token_ids, LAYERS)
    assert answer.risk == pytest.approx(watcher.score_answer(seen, LAYERS), abs=2e-3)
    assert engine.chat(messages, sampling=Sampling(max_tokens=12)).risk is None
    with pytest.raises(
        UsageError, match=r"reads layer 10, which this engine does not capture\. Create the engine with trimtab\.Engine"
    ):
        engine.chat(messages, detector=make_detector(frozen, base, "other", (10,)))
