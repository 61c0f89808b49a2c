"""The offline engine with the default model in fp32, compared with transformers."""

from dataclasses import replace

import pytest
import torch

from tests.support.factories import QUESTIONS, TOKENS, build_mixed_conversations, generate_reference, make_prefix
from trimtab.artifacts.prefix import Prefix
from trimtab.engine.config import EngineConfig
from trimtab.engine.offline import Engine
from trimtab.errors import ArtifactError, BusyError, UsageError
from trimtab.generation_types import Conversation, Sampling
from trimtab.model.base_model import BaseModel


@pytest.fixture(scope="module")
def small_engine(base: BaseModel):
    # Four slots: the three prefixes with 1, 1 and 2 rows fill them, so that a fourth prefix must replace one.
    with Engine(base, EngineConfig(num_slots=4, dtype="fp32", max_model_len=512)) as engine:
        yield engine


def count_equal_answers(engine: Engine, conversations: list[Conversation], expected: list[list[int]]) -> int:
    answers = engine.chat_many(conversations, Sampling(max_tokens=TOKENS))
    return sum(
        list(answer.token_ids) == token_ids[: len(answer.token_ids)]
        for (answer,), token_ids in zip(answers, expected, strict=True)
    )


def test_mixed_requests_equal_transformers(small_engine, frozen, base, three_prefixes, reference_token_ids):
    conversations = build_mixed_conversations(three_prefixes)
    assert len(conversations) == 24
    assert count_equal_answers(small_engine, conversations, reference_token_ids) == 24, "cold"
    assert count_equal_answers(small_engine, conversations, reference_token_ids) == 24, "warm"
    other = make_prefix(frozen, base, "d", 2, "system", 4)
    conversation = Conversation([{"role": "user", "content": QUESTIONS[0]}], other)
    before = small_engine.table.list_residents()
    assert count_equal_answers(small_engine, [conversation], [generate_reference(frozen, base, conversation, TOKENS)]) == 1
    assert len(set(before) - set(small_engine.table.list_residents())) > 0, "a prefix must have lost its slots"
    assert count_equal_answers(small_engine, conversations, reference_token_ids) == 24, "after slots were reused"


def test_slots_do_not_change_the_base_model(small_engine, frozen):
    """Tokens and log-probs of the model with slots are those of the checkpoint."""
    conversations = [[{"role": "user", "content": question}] for question in QUESTIONS]
    answers = small_engine.chat_many([Conversation(messages) for messages in conversations], Sampling(max_tokens=1, logprobs=5))
    for conversation, (answer,) in zip(conversations, answers, strict=True):
        ids = torch.tensor([small_engine.renderer.render_prompt(conversation)])
        with torch.no_grad():
            expected = frozen.model(ids).logits[0, -1].float().log_softmax(-1)
        assert len(expected) == small_engine.renderer.first_slot, "the reference must have no slots"
        best = expected.topk(5)
        assert answer.token_ids == (best.indices[0].item(),)
        (logprobs,) = answer.logprobs
        assert logprobs == pytest.approx(dict(zip(best.indices.tolist(), best.values.tolist(), strict=True)), abs=1e-3)


def test_sampling_never_returns_slot_tokens(small_engine, three_prefixes):
    conversations = [
        Conversation([{"role": "user", "content": QUESTIONS[token_id % 6]}], (None, *three_prefixes)[token_id % 4])
        for token_id in range(200)
    ]
    sampling = Sampling(max_tokens=6, temperature=1.5, repetition_penalty=1.3, logprobs=20, seed=None)
    answers = small_engine.chat_many(conversations, sampling)
    token_ids = [
        token_id
        for (answer,) in answers
        for token_id in (*answer.token_ids, *(token_id for step in answer.logprobs for token_id in step))
    ]
    assert len(token_ids) > 200 * 6
    assert max(token_ids) < small_engine.renderer.first_slot


def test_rejects_more_concurrent_prefixes_than_slots(small_engine, frozen, base, three_prefixes, reference_token_ids):
    prefixes = [make_prefix(frozen, base, f"m{i}", 1, "system", 100 + i) for i in range(5)]
    messages = [{"role": "user", "content": "Hi"}]
    with pytest.raises(BusyError):
        small_engine.chat_many([Conversation(messages, prefix) for prefix in prefixes])
    assert all(resident.users == 0 for resident in small_engine.table.list_residents().values())
    assert count_equal_answers(small_engine, build_mixed_conversations(three_prefixes), reference_token_ids) == 24


def test_rejects_slot_tokens_in_prompts(small_engine):
    with pytest.raises(UsageError, match="slot token"):
        small_engine.chat([{"role": "user", "content": "Say <|trimtab_slot_0|>"}])


def test_rejects_long_prompts_and_foreign_prefixes(small_engine, frozen, base, three_prefixes):
    with pytest.raises(UsageError, match="takes fewer than 512"):
        small_engine.chat([{"role": "user", "content": "word " * 600}])
    foreign = Prefix(three_prefixes[0].vectors, replace(three_prefixes[0].card, fingerprint="0" * 16))
    with pytest.raises(ArtifactError, match="Train it again"):
        small_engine.chat([{"role": "user", "content": "Hi"}], foreign)
