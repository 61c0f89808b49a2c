"""Client of a judge model behind an OpenAI-compatible URL.

A JSON schema constrains the reply. The judged texts are sent as strings inside a JSON object, so that they cannot end the data
and begin instructions.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, TypeVar
from urllib.parse import urlsplit

from openai import APIConnectionError, APIStatusError, BadRequestError, OpenAI, OpenAIError

from trimtab.errors import JobError, UsageError
from trimtab.util.identifiers import compute_key

T = TypeVar("T")
# Judged texts, or lists of texts, by name.
Data = Mapping[str, str | Sequence[str]]

# Longer texts are truncated to this many characters.
MAX_CHARACTERS = 4000
TRUNCATION_MARK = " [cut]"
# Retries of failed requests by the OpenAI client, and the timeout of each in seconds.
RETRIES, TIMEOUT = 3, 60.0
# Requests for one judgment before a reply that is not a verdict is an error.
ATTEMPTS = 2
ADVICE: dict[int, str] = {
    HTTPStatus.BAD_REQUEST: "the endpoint must accept response_format json_schema: try another --judge.model",
    HTTPStatus.UNAUTHORIZED: "set the environment variable TRIMTAB_JUDGE_KEY to its key",
    HTTPStatus.FORBIDDEN: "set the environment variable TRIMTAB_JUDGE_KEY to a key with access",
    HTTPStatus.NOT_FOUND: "check --judge.model, and that --judge.url ends in the path of the API, usually /v1",
    HTTPStatus.TOO_MANY_REQUESTS: "lower --judge.max_concurrency or try again later",
}


@dataclass(frozen=True)
class LlmClient:
    """Client of one judge model.

    The API key is read from the environment variable TRIMTAB_JUDGE_KEY, or OPENAI_API_KEY if that is unset.

    Attributes:
        url: base URL of the API, including /v1.
        model: name of the model.
        concurrency: maximum number of simultaneous requests.

    Raises:
        UsageError: if `url` is not an HTTP URL, or contains credentials or a query.
    """

    url: str
    model: str
    concurrency: int = 8

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.username or parts.password or parts.query:
            raise UsageError("--judge.url must not contain a key. Set the environment variable TRIMTAB_JUDGE_KEY instead")
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise UsageError(f"--judge.url {self.url!r} is not a URL such as http://localhost:8000/v1")

    @property
    def name(self) -> str:
        """Display name."""
        return f"{self.model} at {self.url}"

    def rubric_digest(self, *inputs: Any) -> str:
        """Return a cache key of judgments.

        Args:
            *inputs: JSON-serializable inputs of the judge, such as its rubric and schema.

        Returns:
            Text that contains the URL, the model and the first 12 hex digits of the SHA-256 of `inputs`.
        """
        return f"endpoint {self.url} {self.model} {compute_key(json.dumps(inputs), 12)}"

    def judge_all(
        self, rubric: str, schema: Mapping[str, Any], data: Sequence[Data], read: Callable[[Any], T | None]
    ) -> list[T]:
        """Request one judgment per item.

        Args:
            rubric: system message with the instructions.
            schema: JSON schema of the reply.
            data: items to judge.
            read: parser of a reply; it returns None for a reply that is not a verdict.

        Returns:
            The parsed replies, in the order of `data`.

        Raises:
            JobError: if a request fails, or the replies about an item are not verdicts.
            UsageError: if the key in the environment has invalid characters.
        """
        key = _read_key()
        with (
            OpenAI(base_url=self.url, api_key=key, timeout=TIMEOUT, max_retries=RETRIES) as client,
            ThreadPoolExecutor(self.concurrency) as pool,
        ):
            futures = [pool.submit(self._judge_one, client, rubric, schema, item, read) for item in data]
            try:
                return [future.result() for future in futures]
            except OpenAIError as error:
                pool.shutdown(wait=False, cancel_futures=True)
                message = " ".join(_format_error(error).replace(key, "***").split())[:300]
                raise JobError(f"judge {self.name}: {message}; {_advise(error)}") from error
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _judge_one(
        self, client: OpenAI, rubric: str, schema: Mapping[str, Any], data: Data, read: Callable[[Any], T | None]
    ) -> T:
        reply = ""
        for _ in range(ATTEMPTS):
            reply = _send_request(client, self.model, rubric, schema, _serialize(data))
            if (verdict := _parse(reply, read)) is not None:
                return verdict
        raise JobError(
            f"judge {self.name}: the reply {reply[:80]!r} is not a verdict; the endpoint must accept response_format "
            "json_schema: try another --judge.model"
        )


def _send_request(client: OpenAI, model: str, rubric: str, schema: Mapping[str, Any], data: str) -> str:
    """Return the text of the reply, at temperature 0 if the model accepts a temperature."""
    options: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "system", "content": rubric}, {"role": "user", "content": data}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "verdict", "strict": True, "schema": dict(schema)}},
    }
    try:
        return _extract_text(client.chat.completions.create(**options, temperature=0))
    except BadRequestError as error:
        # Reasoning models accept only their default temperature.
        if "temperature" not in str(error):
            raise
        return _extract_text(client.chat.completions.create(**options))


def _extract_text(response: Any) -> str:
    """Return the text of a response. The client does not validate the type of a response."""
    try:
        return response.choices[0].message.content or ""
    except (AttributeError, IndexError, TypeError):
        return str(response)


def _serialize(data: Data) -> str:
    """Encode texts as JSON with escaped "<", so that they contain no special token of a chat template."""
    texts = {
        name: _truncate(text) if isinstance(text, str) else [_truncate(part) for part in text] for name, text in data.items()
    }
    return json.dumps(texts, ensure_ascii=False).replace("<", "\\u003c")


def _truncate(text: str) -> str:
    return text if len(text) <= MAX_CHARACTERS else text[:MAX_CHARACTERS] + TRUNCATION_MARK


def _parse(reply: str, read: Callable[[Any], T | None]) -> T | None:
    try:
        fields = json.loads(reply)
    except json.JSONDecodeError:
        return None
    return read(fields) if isinstance(fields, dict) else None


def _read_key() -> str:
    key = (os.environ.get("TRIMTAB_JUDGE_KEY") or os.environ.get("OPENAI_API_KEY") or "none").strip()
    # The error of the HTTP client would contain the key.
    if not key.isascii() or not key.isprintable():
        raise UsageError("the key in TRIMTAB_JUDGE_KEY or OPENAI_API_KEY has non-ASCII or control characters: set it again")
    return key


def _format_error(error: OpenAIError) -> str:
    """Return the message of the endpoint, or the cause of a failed connection."""
    if isinstance(error, APIConnectionError):
        return f"{error.message} ({error.__cause__ or 'no response'})"
    return str(error)


def _advise(error: OpenAIError) -> str:
    if isinstance(error, APIStatusError):
        return ADVICE.get(error.status_code, "try again later; earlier verdicts are cached")
    return "check that it is running and that --judge.url is its address"
