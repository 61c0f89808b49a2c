"""Token guard: reserved token ids in prompts, cache salts, and requests that wait for a transfer of vectors."""

import asyncio
from types import SimpleNamespace

import pytest
from vllm.exceptions import VLLMValidationError

from trimtab.engine.context import Steering, reads_supplied_answer, steering
from trimtab.engine.prefixes.token_guard import check_token_ids, install_token_guard
from trimtab.engine.vllm_ext import patches
from trimtab.engine.vllm_ext.args import SUPPLIED_ANSWER_START

FIRST_SLOT = 100
RESERVED = "the prompt contains reserved token ids"


class RecordingEngine:
    """Engine that records the requests that reach it, and the prompts that reach its renderer."""

    def __init__(self) -> None:
        self.added: list[tuple] = []
        self.aborted: list[str] = []
        self.renderer = SimpleNamespace(process_for_engine=self.render, process_for_engine_async=self.render)

    def render(self, prompt, arrival_time=None):
        return prompt

    async def add_request(self, request_id, prompt, params, *args, **options):
        self.added.append((request_id, prompt, params, args, options))
        return f"internal-{request_id}"

    async def abort(self, request_id) -> None:
        self.aborted.append(request_id)


class StartRenderer:
    """Renderer with a beginning-of-sequence token, after which slot tokens are inserted."""

    first_slot = FIRST_SLOT

    def insert_slots_at_start(self, ids, slots):
        return [ids[0], *slots, *ids[1:]]


@pytest.fixture
def guarded_engine(monkeypatch):
    """Engine with the guard. The check of vLLM's symbols is left to `test_patches`, because it imports all of vLLM."""
    monkeypatch.setattr(patches.REGISTER, "check", lambda *names: None)
    engine = RecordingEngine()
    install_token_guard(engine, StartRenderer())
    return engine


def steer(position="system", slots=(100, 101), **fields):
    """Make the steering of a request, by default with two slots at position `system`."""
    return Steering("p", 1, None, position, slots, "salt", **fields)


def run_with(prefix, function):
    """Run a coroutine function with a prefix as the context of the request."""

    async def run():
        steering.set(prefix)
        return await function()

    return asyncio.run(run())


def add(engine, prompt, prefix=None, params=None, **options):
    return run_with(prefix, lambda: engine.add_request("r", prompt, params, **options))


def render(engine, prompt, prefix=None, name="process_for_engine"):
    async def call():
        return getattr(engine.renderer, name)(prompt)

    return run_with(prefix, call)


@pytest.mark.parametrize(
    ("ids", "slots"), [([], ()), ([1, 99], ()), ([1, 100, 101, 2], (100, 101)), ([100], (100,)), ([5, 101], [101])]
)
def test_exact_slot_tokens_are_accepted(ids, slots):
    check_token_ids(ids, FIRST_SLOT, slots)


@pytest.mark.parametrize(
    ("ids", "slots"),
    [
        ([100], ()),
        ([1, 2, 150], ()),
        ([101, 100], (100, 101)),
        ([100], (100, 101)),
        ([1, 2], (100,)),
        ([100, 100], (100,)),
        ([101], (100,)),
    ],
)
def test_other_slot_tokens_are_rejected(ids, slots):
    with pytest.raises(VLLMValidationError, match=RESERVED):
        check_token_ids(ids, FIRST_SLOT, slots)


def test_request_reaches_the_engine_unchanged(guarded_engine):
    prompt, params = {"prompt_token_ids": [1, 2]}, SimpleNamespace(extra_args={"other": 1})
    assert add(guarded_engine, prompt, params=params, priority=3) == "internal-r"
    assert guarded_engine.added == [("r", prompt, params, (), {"priority": 3})]


@pytest.mark.parametrize("as_object", [False, True])
def test_request_without_a_prefix_has_no_slot_tokens(guarded_engine, as_object):
    prompt = {"prompt_token_ids": [1, 100]}
    with pytest.raises(VLLMValidationError, match=RESERVED):
        add(guarded_engine, SimpleNamespace(**prompt) if as_object else prompt)
    assert guarded_engine.added == []


def test_request_with_a_prefix_has_exactly_its_slot_tokens(guarded_engine):
    add(guarded_engine, {"prompt_token_ids": [1, 100, 101]}, steer())
    for ids in ([1, 2], [1, 100], [1, 100, 101, 102]):
        with pytest.raises(VLLMValidationError, match=RESERVED):
            add(guarded_engine, {"prompt_token_ids": ids}, steer())
    assert len(guarded_engine.added) == 1


def test_prompt_embeddings_are_rejected(guarded_engine):
    for prompt in ({"prompt_embeds": [1]}, SimpleNamespace(prompt_embeds=[1])):
        with pytest.raises(VLLMValidationError, match="prompt embeddings are not supported"):
            add(guarded_engine, prompt)
        with pytest.raises(VLLMValidationError, match="prompt embeddings are not supported"):
            render(guarded_engine, prompt)


def test_given_answer_is_accepted_in_score_requests_only(guarded_engine):
    prompt, params = {"prompt_token_ids": [1]}, SimpleNamespace(extra_args={SUPPLIED_ANSWER_START: 1})
    with pytest.raises(VLLMValidationError, match=f"{SUPPLIED_ANSWER_START} is not a request argument"):
        add(guarded_engine, prompt, params=params)
    assert guarded_engine.added == []

    async def score():
        reads_supplied_answer.set(True)
        return await guarded_engine.add_request("r", prompt, params)

    assert run_with(None, score) == "internal-r"
    add(guarded_engine, prompt, params=SimpleNamespace(extra_args=None))
    add(guarded_engine, prompt, params=SimpleNamespace())
    assert len(guarded_engine.added) == 3


@pytest.mark.parametrize("name", ["process_for_engine", "process_for_engine_async"])
def test_rendered_prompt_without_a_prefix_is_checked(guarded_engine, name):
    prompt = {"prompt_token_ids": [1, 2], "cache_salt": "mine"}
    assert render(guarded_engine, prompt, name=name) is prompt
    assert prompt == {"prompt_token_ids": [1, 2], "cache_salt": "mine"}
    with pytest.raises(VLLMValidationError, match=RESERVED):
        render(guarded_engine, {"prompt_token_ids": [1, 100]}, name=name)


@pytest.mark.parametrize("position", ["system", "system-end", "user", "user-end"])
def test_rendered_prompt_with_a_prefix_gets_its_salt(guarded_engine, position):
    rendered = render(guarded_engine, {"prompt_token_ids": [1, 100, 101]}, steer(position))
    assert rendered == {"prompt_token_ids": [1, 100, 101], "cache_salt": "salt"}
    rendered = render(guarded_engine, {"prompt_token_ids": [1, 100, 101], "cache_salt": "mine"}, steer(position))
    assert rendered["cache_salt"] == "salt:mine"
    with pytest.raises(VLLMValidationError, match=RESERVED):
        render(guarded_engine, {"prompt_token_ids": [1, 2]}, steer(position))


def test_prefix_at_the_start_is_inserted_after_the_first_token(guarded_engine):
    prompt = {"prompt_token_ids": [1, 2, 3], "prompt_token_offsets": [0, 1, 2]}
    assert render(guarded_engine, prompt, steer("start")) == {"prompt_token_ids": [1, 100, 101, 2, 3], "cache_salt": "salt"}
    assert render(guarded_engine, {"prompt_token_ids": [1, 2]}, steer("start"))["prompt_token_ids"] == [1, 100, 101, 2]
    with pytest.raises(VLLMValidationError, match=RESERVED):
        render(guarded_engine, {"prompt_token_ids": [1, 100, 101]}, steer("start"))


def test_request_waits_for_the_vectors_of_its_prefix(guarded_engine):
    async def run():
        written = asyncio.get_running_loop().create_future()
        steering.set(steer(written=written))
        request = asyncio.create_task(guarded_engine.add_request("r", {"prompt_token_ids": [100, 101]}, None))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert len(guarded_engine.added) == 1, "the request must be in the engine before the vectors have arrived"
        assert not request.done()
        written.set_result(None)
        assert await request == "internal-r"

    asyncio.run(run())
    assert guarded_engine.aborted == []


def test_failed_transfer_aborts_the_request(guarded_engine):
    async def run():
        written = asyncio.get_running_loop().create_future()
        written.set_exception(ConnectionError("the engine is gone"))
        steering.set(steer(written=written))
        await guarded_engine.add_request("r", {"prompt_token_ids": [100, 101]}, None)

    with pytest.raises(ConnectionError):
        asyncio.run(run())
    assert guarded_engine.aborted == ["r"]


def test_cancelled_request_is_aborted_and_the_transfer_continues(guarded_engine):
    async def run():
        written = asyncio.get_running_loop().create_future()
        steering.set(steer(written=written))
        request = asyncio.create_task(guarded_engine.add_request("r", {"prompt_token_ids": [100, 101]}, None))
        while not guarded_engine.added:
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request
        assert not written.cancelled(), "other requests wait for the same transfer"

    asyncio.run(run())
    assert guarded_engine.aborted == ["r"]
