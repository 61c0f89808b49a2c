"""Error responses for requests that vLLM cannot parse.

vLLM answers invalid values with status 400. Some malformed requests, however, raise errors that it does not expect while it
parses or renders them, and that it answers with status 500. A client would then retry a request that can never succeed.
"""

import logging
from typing import Any

from fastapi import Request
from starlette.responses import JSONResponse

from trimtab.engine.detectors.request_risk import current_risk
from trimtab.engine.metrics import MALFORMED_REQUESTS
from trimtab.engine.protocols.errors import build_error_body

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


def was_accepted() -> bool:
    """Return whether the engine has accepted the current request. A later error is then not one of the request."""
    return (risk := current_risk.get()) is not None and bool(risk.ids)


async def _answer_error(request: Request, error: Exception) -> JSONResponse:
    if was_accepted():
        # Starlette answers it with status 500.
        raise error
    # The log has no message, which may quote the request.
    log.warning("vLLM raised %s for a request that it cannot parse", type(error).__name__)
    MALFORMED_REQUESTS.labels(type(error).__name__).inc()
    return JSONResponse(build_error_body(request.url.path, 400, f"vLLM could not process this request: {error}"), 400)
