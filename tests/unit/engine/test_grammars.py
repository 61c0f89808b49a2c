"""Validation of schemas and grammars: in threads, within time and size limits, and once."""

import asyncio
import json
import threading
import time
from types import SimpleNamespace

import pytest
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams

from trimtab.engine.context import validated_grammar
from trimtab.engine.vllm_ext import grammars
from trimtab.engine.vllm_ext.grammars import GrammarValidator

ENGINE = SimpleNamespace(input_processor=SimpleNamespace(model_config=1, structured_outputs_config=2, tokenizer=3))


class RecordingParams:
    """Sampling parameters that record the thread of their validation."""

    def __init__(self, release: threading.Event | None = None, **fields) -> None:
        self.structured_outputs = StructuredOutputsParams(**fields)
        self.threads: list[int] = []
        self._release = release

    def _validate_structured_outputs(self, *arguments) -> None:
        assert arguments == (1, 2, 3)
        self.threads.append(threading.get_ident())
        if self._release is not None:
            self._release.wait(30)


def deep_schema(levels: int) -> str:
    return '{"items":' * levels + "true" + "}" * levels


def test_valid_grammar_is_validated_in_a_thread_and_marked():
    params = RecordingParams(json={"type": "object"})

    async def run() -> bool:
        await GrammarValidator(ENGINE).validate(params)
        return validated_grammar.get() is params.structured_outputs

    assert asyncio.run(run())
    assert params.threads[0] != threading.get_ident()


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"json": deep_schema(65)}, "nested more than 64 levels"),
        ({"json": deep_schema(5000)}, "nested more than 64 levels"),
        ({"structural_tag": deep_schema(65)}, "nested more than 64 levels"),
        ({"json": {"enum": ["x" * grammars.MAX_GRAMMAR_SIZE]}}, "the limit is"),
        ({"regex": "x" * (grammars.MAX_GRAMMAR_SIZE + 1)}, "the limit is"),
        ({"choice": ["x"] * grammars.MAX_GRAMMAR_SIZE}, "the limit is"),
    ],
)
def test_rejects_large_or_deep_grammar_without_validation(fields, reason):
    params = RecordingParams(**fields)
    with pytest.raises(VLLMValidationError, match=reason):
        asyncio.run(GrammarValidator(ENGINE).validate(params))
    assert params.threads == []


def test_request_without_grammar_is_not_validated():
    asyncio.run(GrammarValidator(ENGINE).validate(SimpleNamespace(structured_outputs=None)))
    asyncio.run(GrammarValidator(ENGINE).validate(SimpleNamespace()))


def test_slow_validation_ends_in_an_error_while_the_loop_goes_on():
    release = threading.Event()
    params = RecordingParams(release, json=json.loads(deep_schema(3)))

    async def run() -> int:
        validation = asyncio.create_task(GrammarValidator(ENGINE, seconds=0.2).validate(params))
        turns = 0
        deadline = time.monotonic() + 30
        while not validation.done() and time.monotonic() < deadline:
            turns += 1
            await asyncio.sleep(0)
        release.set()
        with pytest.raises(VLLMValidationError, match=r"takes longer than 0\.2 seconds"):
            await validation
        assert validated_grammar.get() is None
        return turns

    assert asyncio.run(run()) > 10
