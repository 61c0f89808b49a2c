"""The engine in this process, with the real model in fp32: it answers as transformers does, whatever else is in flight."""

import pytest
import torch

from tests.support.factories import QUESTIONS, TOKENS, make_prefix, mixed_asks, reference
from trimtab.artifacts.prefix import Prefix
from trimtab.engine.config import EngineConfig
from trimtab.engine.offline import Engine
from trimtab.errors import ArtifactError, BusyError, UsageError
from trimtab.generation_types import Conversation, Sampling
from trimtab.model.base_model import BaseModel


@pytest.fixture(scope="module")
def engine(base: BaseModel):
    # Four rows: three prefixes of 1, 1 and 2 rows fill them, a fourth must take some.
    with Engine(base, EngineConfig(num_slots=4, dtype="fp32", max_model_len=512)) as engine:
        yield engine


def equal(engine: Engine, asks: list[Conversation], wanted: list[list[int]]) -> int:
    answers = engine.chat_many(asks, Sampling(max_tokens=TOKENS))
    return sum(list(a.token_ids) == w[: len(a.token_ids)] for (a,), w in zip(answers, wanted, strict=True))


def test_mixed_requests_equal_transformers_cold_warm_and_after_reuse(engine, frozen, base, three, wanted):
    asks = mixed_asks(three)
    assert len(asks) == 24
    assert equal(engine, asks, wanted) == 24, "cold"
    assert equal(engine, asks, wanted) == 24, "warm"
    other = make_prefix(frozen, base, "d", 2, "system", 4)
    ask = Conversation([{"role": "user", "content": QUESTIONS[0]}], other)
    before = engine.table.list_residents()
    assert equal(engine, [ask], [reference(frozen, base, ask, TOKENS)]) == 1
    assert len(set(before) - set(engine.table.list_residents())) > 0, "a prefix must have lost its rows"
    assert equal(engine, asks, wanted) == 24, "after rows were reused"


def test_the_base_model_is_unchanged_by_the_rows(engine, frozen):
    """Tokens and log-probs of the enlarged model are those of the checkpoint as it is."""
    conversations = [[{"role": "user", "content": q}] for q in QUESTIONS]
    answers = engine.chat_many([Conversation(c) for c in conversations], Sampling(max_tokens=1, logprobs=5))
    for conversation, (answer,) in zip(conversations, answers, strict=True):
        ids = torch.tensor([engine.renderer.render_prompt(conversation)])
        with torch.no_grad():
            wanted = frozen.model(ids).logits[0, -1].float().log_softmax(-1)
        assert len(wanted) == engine.renderer.first_slot, "the reference has no rows"
        best = wanted.topk(5)
        assert answer.token_ids == (best.indices[0].item(),)
        (given,) = answer.logprobs
        assert given == pytest.approx(dict(zip(best.indices.tolist(), best.values.tolist(), strict=True)), abs=1e-3)


def test_sampling_never_gives_a_reserved_token(engine, three):
    asks = [Conversation([{"role": "user", "content": QUESTIONS[i % 6]}], (None, *three)[i % 4]) for i in range(200)]
    hot = Sampling(max_tokens=6, temperature=1.5, repetition_penalty=1.3, logprobs=20, seed=None)
    answers = engine.chat_many(asks, hot)
    seen = [i for (a,) in answers for i in (*a.token_ids, *(i for step in a.logprobs for i in step))]
    assert len(seen) > 200 * 6
    assert max(seen) < engine.renderer.first_slot


def test_more_prefixes_than_rows_at_once_is_refused_and_harmless(engine, frozen, base, three, wanted):
    many = [make_prefix(frozen, base, f"m{i}", 1, "system", 100 + i) for i in range(5)]
    conversation = [{"role": "user", "content": "Hi"}]
    with pytest.raises(BusyError):
        engine.chat_many([Conversation(conversation, p) for p in many])
    assert all(r.users == 0 for r in engine.table.list_residents().values())
    assert equal(engine, mixed_asks(three), wanted) == 24


def test_prompts_cannot_hold_row_tokens(engine):
    with pytest.raises(UsageError, match="slot token"):
        engine.chat([{"role": "user", "content": "Say <|trimtab_slot_0|>"}])


def test_too_long_prompts_and_foreign_prefixes_are_refused(engine, frozen, base, three):
    with pytest.raises(UsageError, match="takes fewer than 512"):
        engine.chat([{"role": "user", "content": "word " * 600}])
    from dataclasses import replace

    foreign = Prefix(three[0].vectors, replace(three[0].card, fingerprint="0" * 16))
    with pytest.raises(ArtifactError, match="Train it again"):
        engine.chat([{"role": "user", "content": "Hi"}], foreign)
