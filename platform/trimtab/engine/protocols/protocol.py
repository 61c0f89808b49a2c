"""Interface of an API protocol: the parts of request, response and stream that trimtab reads or writes."""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Set
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from trimtab.engine import asgi
from trimtab.engine.context import Steering
from trimtab.engine.detectors.request_risk import RequestRisk

JsonObject = dict[str, Any]


@dataclass(frozen=True)
class Annotation:
    """Prefix and detector of a request, as its response names them.

    Attributes:
        base: name of the base model.
        steering: prefix of the request; None for the plain base model.
        risk: detector and risks of the request.
    """

    base: str
    steering: Steering | None
    risk: RequestRisk

    @cached_property
    def model_bytes(self) -> tuple[bytes, bytes]:
        """The `model` of vLLM's response and of the response, as encoded fields; every chunk of a stream needs them."""
        return f'"model":"{self.base}"'.encode(), f'"model":"{self.model}"'.encode()

    @property
    def model(self) -> str:
        """The `model` of the response: `<base>`, or `<base>:<prefix>@<version>`."""
        return f"{self.base}:{self.steering.name}@{self.steering.version}" if self.steering else self.base

    @property
    def refusals(self) -> Mapping[int, str]:
        """Answers of policies that refuse the prompt, by index of the choice."""
        return self.risk.verdicts.refusals

    @property
    def stopped(self) -> Set[int]:
        """Choices that a policy stopped while they were generated."""
        return self.risk.answers.stopped

    def build_field(self) -> JsonObject:
        """Return the `trimtab` field of a response, with its prefix and detectors."""
        steering = self.steering
        prefix = {"name": steering.name, "version": steering.version, "run_id": steering.run_id} if steering else None
        return {"prefix": prefix, "detectors": self.risk.as_json()}


@dataclass(frozen=True)
class Event:
    """A server-sent event with a name and JSON data."""

    name: str
    data: JsonObject

    def encode(self) -> bytes:
        """Return the event as sent, without the empty line that ends it."""
        return b"event: " + self.name.encode() + b"\ndata: " + asgi.dump_json(self.data)


class Protocol(ABC):
    """API protocol of an endpoint of vLLM's server.

    Attributes:
        has_messages: whether its requests are conversations, into which a prefix can be inserted at any position.
    """

    has_messages = True

    @abstractmethod
    def prepare_request(self, request: JsonObject) -> JsonObject:
        """Return the request to process. Raise UsageError for features that the server does not have."""

    @abstractmethod
    def get_user(self, request: Mapping[str, Any]) -> str | None:
        """Return the id of the end user that a request names, which selects a version in a traffic split."""

    def rewrite_response(self, body: JsonObject, annotation: Annotation) -> JsonObject:
        """Return a complete response with the name of its version and the `trimtab` field."""
        return body | {"model": annotation.model, "trimtab": annotation.build_field()}

    @abstractmethod
    def rewrite_event(self, event: bytes, annotation: Annotation) -> bytes:
        """Return an event of a stream with the name of its version, and the last one with the `trimtab` field."""

    @abstractmethod
    def withhold_answers(self, body: JsonObject, texts: Mapping[int, str]) -> None:
        """Replace answers of a complete response in place, and mark them as filtered.

        Args:
            body: complete response with its `trimtab` field.
            texts: replacement by index of the choice.
        """

    @abstractmethod
    def build_stream(self, body: JsonObject, *, usage: bool) -> bytes:
        """Return a complete response as a stream.

        Args:
            body: complete response with its `trimtab` field.
            usage: whether the client requests the usage in the stream.
        """

    def rewrite_error(self, status: int, body: bytes) -> bytes:
        """Return the body of an error response in the format of the protocol."""
        return body


def parse_event(event: bytes) -> Event | None:
    """Parse a server-sent event with a name and JSON data; return None for other events, such as comments."""
    name, separator, data = event.partition(b"\ndata: ")
    if not separator or not name.startswith(b"event: "):
        return None
    return Event(name.removeprefix(b"event: ").decode(), json.loads(data))


def add_running_risk(event: Event, annotation: Annotation) -> bytes:
    """Return a delta of the only answer of a stream with its risk so far, if that is known."""
    described = annotation.risk.describe_choice(0)
    return Event(event.name, event.data | ({"trimtab": described} if described else {})).encode()
