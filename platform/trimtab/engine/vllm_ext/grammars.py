"""Validation of the schemas and grammars of requests, outside of the event loop and within limits.

vLLM validates them in its event loop, in which all streams and health checks wait. Some schemas take seconds.
"""

import asyncio
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

from vllm.exceptions import VLLMValidationError

from trimtab.engine import asgi
from trimtab.engine.context import validated_grammar
from trimtab.engine.vllm_ext import patches
from trimtab.errors import UsageError

# Fields of requests that contain a schema or grammar.
GRAMMAR_FIELDS = ("response_format", "structured_outputs", "text")
# Maximum size of a schema or grammar, in characters of its JSON.
MAX_GRAMMAR_SIZE = 1 << 18
VALIDATION_SECONDS = 5.0
# Other requests with a schema wait while both are busy, and time out; requests without one do not wait.
THREADS = 2


def install_grammar_validation(engine: Any) -> None:
    """Validate the structured outputs of every request to a `vllm.AsyncLLM` in a thread."""
    validator = GrammarValidator(engine)

    def wrap(add_request: Callable[..., Any]) -> Callable[..., Any]:
        async def add(request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
            await validator.validate(params)
            return await add_request(request_id, prompt, params, *args, **kwargs)

        return add

    patches.patch_grammar_validation()
    patches.patch_add_request(engine, "grammars", wrap)


class GrammarValidator:
    """Validator of structured outputs.

    Args:
        engine: vLLM's engine.
        seconds: time limit of a validation.
    """

    def __init__(self, engine: Any, seconds: float = VALIDATION_SECONDS) -> None:
        self._processor = engine.input_processor
        self._seconds = seconds
        self._executor = ThreadPoolExecutor(THREADS, "trimtab-grammar")

    async def validate(self, params: Any) -> None:
        """Validate the structured outputs of sampling parameters, if there are any; vLLM then does not validate them again.

        Raises:
            VLLMValidationError: if they are invalid or too large, or the validation takes too long (HTTP 400).
        """
        if (structured := getattr(params, "structured_outputs", None)) is None:
            return
        try:
            check_grammar(asdict(structured))
        except UsageError as error:
            raise VLLMValidationError(str(error)) from error
        processor, loop = self._processor, asyncio.get_running_loop()
        arguments = processor.model_config, processor.structured_outputs_config, processor.tokenizer
        # A private method, but the one that vLLM calls; the register checks that it exists.
        validation = loop.run_in_executor(self._executor, params._validate_structured_outputs, *arguments)
        try:
            await asyncio.wait_for(validation, self._seconds)
        except TimeoutError as error:
            message = f"the schema or grammar takes longer than {self._seconds:g} seconds to validate. Use a smaller one"
            raise VLLMValidationError(message) from error
        validated_grammar.set(structured)


def check_grammar(values: Mapping[str, Any]) -> None:
    """Check the size of a schema or grammar, and the depth of a schema that is given as text.

    Args:
        values: structured outputs, or the fields of a request that contain them.

    Raises:
        UsageError: if they are too large or too deep.
    """
    size = len(json.dumps(values, default=str))
    if size > MAX_GRAMMAR_SIZE:
        raise UsageError(f"the schema or grammar has {size} characters; the limit is {MAX_GRAMMAR_SIZE}")
    for name in ("json", "structural_tag"):
        if isinstance(value := values.get(name), str) and _is_deep_text(value):
            raise UsageError(f"structured_outputs.{name} is nested more than {asgi.MAX_DEPTH} levels deep")


def _is_deep_text(text: str) -> bool:
    try:
        return asgi.is_deep(json.loads(text))
    except RecursionError:
        return True
    except ValueError:
        return False
