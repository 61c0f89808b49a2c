"""OpenAPI document of the server: vLLM's forwarded paths, and the extensions of trimtab."""

from collections.abc import Collection
from importlib.metadata import version
from typing import Any, get_args

from trimtab.engine.detectors.request_risk import EMPTY
from trimtab.engine.extensions import MAX_ATTEMPTS, MAX_TEXT, THRESHOLD_KEYS, Policy
from trimtab.engine.openai.handler import SCORE_PATH
from trimtab.engine.openai.moderations import MODERATIONS_PATH
from trimtab.engine.policies import ACTIONS, MAX_POLICIES
from trimtab.engine.protocols.paths import PROTOCOLS

REQUESTS = ("ChatCompletionRequest", "CompletionRequest", "ResponsesRequest", "AnthropicMessagesRequest")


def build_openapi_document(vllm: dict[str, Any], paths: Collection[str]) -> dict[str, Any]:
    """Build the OpenAPI document of the server.

    Args:
        vllm: OpenAPI document of vLLM's server.
        paths: paths of vLLM's server to include.

    Returns:
        The document with the field `trimtab` in completion requests, and with `/v1/score` and `/v1/moderations`.
    """
    response = {"type": "object", "properties": {"trimtab": {"$ref": "#/components/schemas/ResponseField"}}}
    answered = {
        "description": "Response of the protocol with a trimtab field.",
        "content": {"application/json": {"schema": response}},
    }
    schemas: dict[str, Any] = vllm["components"]["schemas"] | COMPONENTS
    for name in REQUESTS:
        schema = schemas[name]
        schemas[name] = schema | {
            "properties": schema["properties"] | {"trimtab": {"$ref": "#/components/schemas/RequestOptions"}}
        }
    included = {path: operations for path, operations in vllm["paths"].items() if path in paths}
    for path in PROTOCOLS:
        post = included[path]["post"]
        included[path] = included[path] | {"post": post | {"responses": post["responses"] | {"200": answered}}}
    body = {"required": True, "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ScoreRequest"}}}}
    answer = {"200": answered | {"description": "Risk of the answer."}, "400": {"description": "Bad input."}}
    included[SCORE_PATH] = {"post": {"summary": "Risk of a supplied answer", "requestBody": body, "responses": answer}}
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/ModerationRequest"}}}
    body, answer = {"required": True, "content": content}, {"200": {"description": "Verdicts by detector."}}
    included[MODERATIONS_PATH] = {"post": {"summary": "Moderation of texts", "requestBody": body, "responses": answer}}
    return {
        "openapi": vllm["openapi"],
        "info": {"title": "trimtab", "version": version("trimtab")},
        "paths": included,
        "components": {"schemas": schemas},
    }


PROBABILITY: dict[str, Any] = {"type": ["number", "null"], "minimum": 0, "maximum": 1}
TEXT: dict[str, Any] = {"type": ["string", "null"]}
REQUEST_OPTIONS: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "detector": {"type": ["string", "null"]},
        "false_positive_rate": {"enum": list(THRESHOLD_KEYS)},
        "running_risk": {"type": "boolean"},
        "policy": {"enum": list(get_args(Policy))},
        "risk_threshold": PROBABILITY,
        "max_attempts": {"type": "integer", "minimum": 1, "maximum": MAX_ATTEMPTS},
        "refusal_text": {"type": "string", "maxLength": MAX_TEXT},
        "policies": {"type": "array", "items": {"$ref": "#/components/schemas/Policy"}, "maxItems": MAX_POLICIES},
    },
}
POLICY: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "detector": {"type": "string", "minLength": 1},
        "action": {"enum": list(ACTIONS)},
        "threshold": PROBABILITY,
        "false_positive_rate": PROBABILITY,
        "refusal_text": {"type": "string", "maxLength": MAX_TEXT},
        "max_attempts": {"type": "integer", "minimum": 1, "maximum": MAX_ATTEMPTS},
        "model": TEXT,
        "label": TEXT,
        "unchecked": {"enum": ["fail", "pass"]},
    },
    "required": ["detector"],
}
MODERATION: dict[str, Any] = {
    "type": "object",
    "properties": {
        "model": {"type": "string"},
        "input": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]},
        "trimtab": {"$ref": "#/components/schemas/RequestOptions"},
    },
    "required": ["input"],
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
        "trimtab": {"$ref": "#/components/schemas/RequestOptions"},
    },
    "required": ["messages", "answer"],
}
PREFIX: dict[str, Any] = {
    "type": ["object", "null"],
    "properties": {"name": {"type": "string"}, "version": {"type": "integer"}, "run_id": TEXT},
    "required": ["name", "version", "run_id"],
    "additionalProperties": False,
}
DETECTOR: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": TEXT,
        "version": {"type": ["integer", "null"]},
        "run_id": TEXT,
        "subject": {"enum": ["answer", "prompt"]},
        "label": TEXT,
        "status": {"enum": ["scored", "off", "unavailable"]},
        "probability": PROBABILITY,
        "flagged": {"type": ["boolean", "null"]},
        "threshold": PROBABILITY,
        "false_positive_rate": PROBABILITY,
        "reason": TEXT,
        "warning": TEXT,
        "action": {"enum": [None, *ACTIONS]},
    },
    "required": list(EMPTY),
    "additionalProperties": False,
}
RESPONSE_FIELD: dict[str, Any] = {
    "type": "object",
    "properties": {
        "prefix": PREFIX,
        "detectors": {"type": "array", "items": {"$ref": "#/components/schemas/DetectorVerdict"}},
        "attempts": {"type": "integer", "minimum": 1},
        "withheld": {"type": "boolean"},
    },
    "required": ["prefix", "detectors"],
    "additionalProperties": False,
}
"""Field `trimtab` of a response and of the last chunk of a stream."""
COMPONENTS: dict[str, Any] = {
    "RequestOptions": REQUEST_OPTIONS,
    "Policy": POLICY,
    "ScoreRequest": SCORE,
    "ModerationRequest": MODERATION,
    "DetectorVerdict": DETECTOR,
    "ResponseField": RESPONSE_FIELD,
}
