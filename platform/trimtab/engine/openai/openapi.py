"""OpenAPI document of the server: vLLM's forwarded paths, and the extensions of trimtab."""

from collections.abc import Collection
from importlib.metadata import version
from typing import Any, get_args

from trimtab.engine.extensions import ALARMS, MOST_TEXT, MOST_TRIES, Policy

REQUESTS = ("ChatCompletionRequest", "CompletionRequest")


def build_openapi_document(vllm: dict[str, Any], paths: Collection[str]) -> dict[str, Any]:
    """Build the OpenAPI document of the server.

    Args:
        vllm: OpenAPI document of vLLM's server.
        paths: paths of vLLM's server to include.

    Returns:
        The document with the field `trimtab` in completion requests, and with `/v1/score`.
    """
    schemas: dict[str, Any] = vllm["components"]["schemas"] | {"Wishes": REQUEST_OPTIONS, "ScoreRequest": SCORE}
    for name in REQUESTS:
        schema = schemas[name]
        schemas[name] = schema | {"properties": schema["properties"] | {"trimtab": {"$ref": "#/components/schemas/Wishes"}}}
    included = {path: operations for path, operations in vllm["paths"].items() if path in paths}
    body = {"required": True, "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ScoreRequest"}}}}
    answer = {"200": {"description": "Risk of the answer."}, "400": {"description": "Bad input."}}
    included["/v1/score"] = {"post": {"summary": "Risk of a given answer", "requestBody": body, "responses": answer}}
    return {
        "openapi": vllm["openapi"],
        "info": {"title": "trimtab", "version": version("trimtab")},
        "paths": included,
        "components": {"schemas": schemas},
    }


REQUEST_OPTIONS: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "detector": {"type": ["string", "null"]},
        "false_alarms": {"enum": list(ALARMS)},
        "running_risk": {"type": "boolean"},
        "policy": {"enum": list(get_args(Policy))},
        "above": {"type": ["number", "null"], "minimum": 0, "maximum": 1},
        "tries": {"type": "integer", "minimum": 1, "maximum": MOST_TRIES},
        "text": {"type": "string", "maxLength": MOST_TEXT},
    },
}
MESSAGE = {
    "type": "object",
    "properties": {"role": {"type": "string"}, "content": {"type": "string"}},
    "required": ["role", "content"],
}
SCORE: dict[str, Any] = {
    "type": "object",
    "properties": {
        "model": {"type": "string"},
        "messages": {"type": "array", "items": MESSAGE, "minItems": 1},
        "answer": {"type": "string"},
        "trimtab": {"$ref": "#/components/schemas/Wishes"},
    },
    "required": ["messages", "answer"],
}
