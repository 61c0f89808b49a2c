"""Names of the fields that vLLM's endpoints read."""

from collections.abc import Collection, Mapping
from typing import Any

from fastapi.routing import APIRoute
from pydantic import BaseModel

# Fields of a request that trimtab reads itself.
SCORE_FIELDS = frozenset({"model", "messages", "answer"})


def find_request_fields(app: Any, paths: Collection[str]) -> Mapping[str, frozenset[str]]:
    """Return the names of the fields of the request bodies by path.

    vLLM ignores other fields, but it holds them in memory until the response ends.

    Args:
        app: vLLM's FastAPI app.
        paths: paths of the endpoints.
    """
    found: dict[str, frozenset[str]] = {}
    for route in app.routes:
        if isinstance(route, APIRoute) and route.path in paths and "POST" in route.methods:
            for parameter in route.dependant.body_params:
                body: Any = parameter.field_info.annotation
                if isinstance(body, type) and issubclass(body, BaseModel):
                    found[route.path] = frozenset(
                        name for key, info in body.model_fields.items() for name in (key, info.alias) if name
                    )
    return found
