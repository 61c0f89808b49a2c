"""Signals captured in the engine, compared with those of one transformers pass over the same text."""

from dataclasses import replace

import pytest
import torch

from tests.support.factories import (
    QUESTIONS,
    compute_prompt_states,
    compute_reference_signals,
    make_detector,
    make_prefix,
    make_prompt_detector,
)
from trimtab.artifacts.card import PrefixCondition
from trimtab.detection.signals import CHECK_INTERVAL, WINDOW, convert_to_prompt_states
from trimtab.engine.config import EngineConfig
from trimtab.engine.offline import Engine
from trimtab.errors import UsageError
from trimtab.generation_types import Answer, Conversation, Sampling
from trimtab.types import FIXED_REFUSAL
from trimtab.util.environment import set_variables

LAYERS = (20, 29)
SHORT = [f"What is the capital of {name}?" for name in ("France", "Spain", "Japan", "Peru", "Chad", "Cuba", "Mali", "Laos")]
LONG = [f"I {'really ' * count}want to know what bread is. Number {count}." for count in (20, 60, 100)]


@pytest.fixture(scope="module", params=["v1", pytest.param("v2", marks=pytest.mark.gpu)])
def signal_engine(request, base):
    """Engine with each of vLLM's model runners; the second one needs a GPU.

    It has small steps, so that prompts are chunked; few blocks, so that requests are preempted; and few slots."""
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
    runner = {"VLLM_USE_V2_MODEL_RUNNER": str(int(request.param == "v2"))}
    with set_variables(runner), Engine(base, config) as running_engine:
        yield running_engine


def assert_signals_match(engine: Engine, frozen, conversations: list[Conversation], answers: list[list[Answer]]) -> None:
    for conversation, samples in zip(conversations, answers, strict=True):
        for answer in samples:
            assert answer.signals is not None
            expected = compute_reference_signals(frozen, engine.renderer, conversation, answer.token_ids, LAYERS)
            assert (answer.signals.psi - expected.psi).norm() / expected.psi.norm() < 1e-3
            torch.testing.assert_close(answer.signals.history, expected.history, rtol=1e-3, atol=2e-3)


def build_conversations(*questions: str, prefix=None) -> list[Conversation]:
    return [Conversation([{"role": "user", "content": question}], prefix) for question in questions]


def test_mixed_requests_match_one_pass_cold_and_cached(signal_engine, frozen, base, monkeypatch):
    """Chunked and preempted requests with and without a prefix, of lengths inside and at the edge of a block; then cached."""
    scheduler, preempted = signal_engine._llm.llm_engine.engine_core.engine_core.scheduler, []
    preempt = scheduler._preempt_request
    monkeypatch.setattr(scheduler, "_preempt_request", lambda *args, **options: preempted.append(preempt(*args, **options)))
    prefix = make_prefix(frozen, base, "p", 2, "system", 1)
    conversations = [*build_conversations(*SHORT, *LONG), *build_conversations(*SHORT[:4], prefix=prefix)]
    for _ in range(2):
        assert_signals_match(
            signal_engine, frozen, conversations, signal_engine.chat_many(conversations, Sampling(max_tokens=60))
        )
    assert preempted, "no request was preempted, so that the test proves less"


def test_prompt_states_match_one_pass_cold_and_cached(signal_engine, frozen, base):
    """Prompts in chunks, of lengths inside and at the edge of a block, with and without a prefix; then cached."""
    prefix = make_prefix(frozen, base, "p", 2, "system", 1)
    conversations = [*build_conversations(*SHORT[:4], *LONG), *build_conversations(*SHORT[4:], prefix=prefix)]
    for _ in range(2):
        answers = signal_engine.chat_many(conversations, Sampling(max_tokens=1))
        for conversation, (answer,) in zip(conversations, answers, strict=True):
            states = compute_prompt_states(frozen, signal_engine.renderer, conversation, LAYERS)
            expected = torch.cat([states[-1], states.mean(0), states[-1] - states.mean(0)], -1)
            psi = convert_to_prompt_states(answer.signals.psi)
            assert (psi - expected).norm() / expected.norm() < 1e-3


def test_unfinished_answers_and_windows_match_one_pass(signal_engine, frozen, base):
    """Generated and supplied answers, and prompts of one, two and more windows, cold and from the prefix cache."""
    conversations = build_conversations(*SHORT[:3], *LONG)
    answers = [answer for (answer,) in signal_engine.chat_many(conversations, Sampling(max_tokens=14), recorded=True)]
    given = signal_engine.score_many(conversations, [answer.text for answer in answers], recorded=True)
    counts = []
    for conversation, *rows in zip(conversations, answers, given, strict=True):
        for answer in rows:
            running = answer.signals.running
            assert len(running) == len(answer.token_ids) // CHECK_INTERVAL
            for number, psi in enumerate(running, 1):
                ids = answer.token_ids[: number * CHECK_INTERVAL]
                expected = compute_reference_signals(frozen, signal_engine.renderer, conversation, ids, LAYERS)
                assert (psi.float() - expected.psi).norm() / expected.psi.norm() < 2e-3
    for _ in range(2):
        recorded = signal_engine.chat_many(conversations, Sampling(max_tokens=1), recorded=True)
        for conversation, (answer,) in zip(conversations, recorded, strict=True):
            states = compute_prompt_states(frozen, signal_engine.renderer, conversation, LAYERS)
            windows = states.split(WINDOW)[:-1] if len(states) % WINDOW else states.split(WINDOW)
            starts = range(0, WINDOW * len(windows), WINDOW)
            ends = [*starts[1:], len(states)]
            means = [states[start:end].mean(0) for start, end in zip(starts, ends, strict=True)] if len(windows) > 1 else []
            assert len(answer.signals.windows) == len(means)
            counts.append(len(means))
            for window, expected in zip(answer.signals.windows, means, strict=True):
                assert (window - expected).norm() / expected.norm() < 1e-3
    assert {0, 2} <= set(counts)


def test_later_turn_reads_previous_answer_from_cache(signal_engine, frozen):
    """A request reads the blocks of another request's answer as its prompt."""
    first = build_conversations(LONG[0])
    ((answer,),) = signal_engine.chat_many(first, Sampling(max_tokens=40))
    messages = [*first[0].messages, {"role": "assistant", "content": answer.text}, {"role": "user", "content": "Go on."}]
    assert_signals_match(
        signal_engine,
        frozen,
        [Conversation(messages)],
        signal_engine.chat_many([Conversation(messages)], Sampling(max_tokens=8)),
    )


def test_each_seeded_sample_has_its_own_signals(signal_engine, frozen):
    """Also for chunked prompts; the same seed gives the same samples."""
    conversations = build_conversations(*SHORT[:3], LONG[2])
    sampling = Sampling(max_tokens=10, temperature=1.0, n=3, seed=1)
    answers = signal_engine.chat_many(conversations, sampling)
    assert_signals_match(signal_engine, frozen, conversations, answers)
    repeated = signal_engine.chat_many(conversations, sampling)
    assert [[answer.text for answer in samples] for samples in repeated] == [
        [answer.text for answer in samples] for samples in answers
    ]


def test_one_token_answer_matches_one_pass(signal_engine, frozen):
    conversations = build_conversations(SHORT[0])
    assert_signals_match(signal_engine, frozen, conversations, signal_engine.chat_many(conversations, Sampling(max_tokens=1)))


def test_sampling_settings_do_not_change_signals(signal_engine, frozen):
    """Signals are of the unmodified distribution, whatever the temperature and penalties."""
    conversations = build_conversations(*SHORT[:2])
    assert_signals_match(
        signal_engine,
        frozen,
        conversations,
        signal_engine.chat_many(conversations, Sampling(max_tokens=10, temperature=1.5, repetition_penalty=1.3, seed=2)),
    )


def test_scored_answers_match_one_pass(signal_engine, frozen, base):
    """Supplied answers are read in chunks and batches, with the signals of one pass."""
    prefix = make_prefix(frozen, base, "p", 2, "system", 1)
    conversations = [
        *build_conversations(*SHORT, *LONG),
        *build_conversations(*SHORT[:4], prefix=prefix),
        *build_conversations(SHORT[0]),
    ]
    texts = ["Paris.", "", "I do not know " * 20, *["It is a town by the sea."] * (len(conversations) - 4), "Paris. " * 200]
    answers = signal_engine.score_many(conversations, texts)
    assert_signals_match(signal_engine, frozen, conversations, [[answer] for answer in answers])
    assert [answer.finish_reason for answer in answers] == ["stop"] * (len(conversations) - 1) + ["length"]
    assert [len(answer.token_ids) for answer in answers[:2]] == [3, 1]


def test_scoring_equals_generation(signal_engine):
    conversations = build_conversations(*SHORT)
    answers = [samples[0] for samples in signal_engine.chat_many(conversations, Sampling(max_tokens=60))]
    finished = [
        (conversation, answer)
        for conversation, answer in zip(conversations, answers, strict=True)
        if answer.finish_reason == "stop"
    ]
    assert finished, "no answer ended with a stop token"
    readings = signal_engine.score_many([conversation for conversation, _ in finished], [answer.text for _, answer in finished])
    pairs = [
        (generated, scored.signals)
        for (_, generated), scored in zip(finished, readings, strict=True)
        if scored.token_ids == generated.token_ids
    ]
    assert pairs, "no text has the same tokens when generated and when scored"
    for answer, signals_read in pairs:
        assert (signals_read.psi - answer.signals.psi).norm() / answer.signals.psi.norm() < 1e-3
        torch.testing.assert_close(signals_read.history, answer.signals.history, rtol=1e-3, atol=2e-3)


def test_answer_has_the_risk_of_the_detector(signal_engine, frozen, base):
    detector = make_detector(frozen, base, "truth", LAYERS)
    messages = [{"role": "user", "content": SHORT[0]}]
    answer = signal_engine.chat(messages, sampling=Sampling(max_tokens=12), detector=detector)
    signals = compute_reference_signals(frozen, signal_engine.renderer, Conversation(messages), answer.token_ids, LAYERS)
    assert answer.risk == pytest.approx(detector.score_answer(signals, LAYERS), abs=2e-3)
    assert signal_engine.chat(messages, sampling=Sampling(max_tokens=12)).risk is None
    with pytest.raises(
        UsageError, match=r"reads layer 10, which this engine does not capture\. Create the engine with trimtab\.Engine"
    ):
        signal_engine.chat(messages, detector=make_detector(frozen, base, "other", (10,)))


def test_conditional_prefix_steers_and_refuses_by_its_guard(signal_engine, frozen, base):
    guard = make_prompt_detector(frozen, base, "guard", LAYERS[:1])
    prefix = make_prefix(frozen, base, "helper", 2, "system", 1)
    condition = PrefixCondition("guard@1", "below", otherwise="refuse")
    conditional = replace(prefix, card=replace(prefix.card, condition=condition))
    sampling, answers = Sampling(max_tokens=8), {}
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question}]
        answer = signal_engine.chat(messages, conditional, sampling, guard=guard)
        expected = signal_engine.chat(messages, prefix, sampling)
        (risk,) = signal_engine.score_prompts([Conversation(messages)], guard)
        flagged = risk > guard.card.thresholds["balanced"]
        assert answer.text == (FIXED_REFUSAL if flagged else expected.text)
        assert (answer.finish_reason == "content_filter") == flagged
        answers[flagged] = answer
    assert set(answers) == {True, False}
    with pytest.raises(UsageError, match="has a condition on detector guard@1"):
        signal_engine.chat(messages, conditional)
