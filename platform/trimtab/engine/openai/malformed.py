"""Error responses for requests that vLLM cannot parse.

vLLM answers invalid values with status 400. Some malformed requests, however, raise errors that it does not expect while it
parses or renders them, and that it answers with status 500. A client would then retry a request that can never succeed.
"""

import logging
from collections.abc import Callable
from typing import Any

from fastapi import Request
from starlette.responses import JSONResponse
from vllm.exceptions import VLLMClientError, VLLMValidationError

from trimtab.engine.detectors.request_risk import current_risk
from trimtab.engine.metrics import MALFORMED_REQUESTS
from trimtab.engine.protocols.errors import build_error_body
from trimtab.engine.vllm_ext import patches

log = logging.getLogger(__name__)

# Errors of code that reads a value of another type or depth than the API defines. vLLM itself answers ValueError, TypeError and
# OverflowError with status 400.
MALFORMED_ERRORS: tuple[type[Exception], ...] = (AttributeError, KeyError, IndexError, RecursionError)


def install_malformed_handlers(app: Any) -> None:
    """Answer `MALFORMED_ERRORS` of vLLM's app with status 400, unless the engine has accepted the request.

    All other errors keep status 500.

    Args:
        app: vLLM's FastAPI app, before its first request.
    """
    for error_class in MALFORMED_ERRORS:
        app.add_exception_handler(error_class, _answer_error)
    # vLLM has built the stack already; Starlette builds it again with the next request.
    app.middleware_stack = None


def install_rejection(engine: Any) -> None:
    """Answer errors of `add_request` of a `vllm.AsyncLLM` with status 400. Install it after the other wrappers of that method.

    vLLM wraps an error that it does not expect there in one without a message, and answers that with status 500.

    Args:
        engine: the engine.
    """

    def wrap(add_request: Callable[..., Any]) -> Callable[..., Any]:
        async def add(*args: Any, **options: Any) -> Any:
            try:
                return await add_request(*args, **options)
            except VLLMClientError:
                raise
            except (ValueError, TypeError, OverflowError, *MALFORMED_ERRORS) as error:
                _count_error(error)
                raise VLLMValidationError(f"vLLM could not process this request: {error}") from error

        return add

    patches.patch_add_request(engine, "rejection", wrap)


def was_accepted() -> bool:
    """Return whether the engine has accepted the current request. A later error is then not one of the request."""
    return (risk := current_risk.get()) is not None and bool(risk.ids)


async def _answer_error(request: Request, error: Exception) -> JSONResponse:
    if was_accepted():
        # Starlette answers it with status 500.
        raise error
    _count_error(error)
    return JSONResponse(build_error_body(request.url.path, 400, f"vLLM could not process this request: {error}"), 400)


def _count_error(error: Exception) -> None:
    # The log has no message, which may quote the request.
    log.warning("vLLM raised %s for a request that it cannot parse", type(error).__name__)
    MALFORMED_REQUESTS.labels(type(error).__name__).inc()
