"""The server's OpenAPI description at `/openapi.json`: vLLM's own of the paths that are let through, and ours."""

from collections.abc import Collection
from importlib.metadata import version
from typing import Any, get_args

from trimtab.engine.extensions import ALARMS, MOST_TEXT, MOST_TRIES, Policy

REQUESTS = ("ChatCompletionRequest", "CompletionRequest")


def build_openapi_document(vllm: dict[str, Any], paths: Collection[str]) -> dict[str, Any]:
    """The description `vllm` of its server, of these `paths` only, with the field `trimtab` in requests for answers and with
    `/v1/score`."""
    schemas: dict[str, Any] = vllm["components"]["schemas"] | {"Wishes": WISHES, "ScoreRequest": SCORE}
    for name in REQUESTS:
        described = schemas[name]
        schemas[name] = described | {
            "properties": described["properties"] | {"trimtab": {"$ref": "#/components/schemas/Wishes"}}
        }
    kept = {path: operations for path, operations in vllm["paths"].items() if path in paths}
    body = {"required": True, "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ScoreRequest"}}}}
    answer = {"200": {"description": "The risk of the answer."}, "400": {"description": "Bad input."}}
    kept["/v1/score"] = {"post": {"summary": "The risk of a given answer", "requestBody": body, "responses": answer}}
    return {
        "openapi": vllm["openapi"],
        "info": {"title": "trimtab", "version": version("trimtab")},
        "paths": kept,
        "components": {"schemas": schemas},
    }


WISHES: dict[str, Any] = {
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
