"""Asking a language model behind any OpenAI-compatible URL for judgements, by a rubric in our own words.

The reply's form is given by a JSON schema. What is judged travels as strings inside a JSON object: nothing in it can end the
data and begin instructions.
"""

import hashlib
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

T = TypeVar("T")
# What is judged: texts, or lists of texts, by name.
Data = Mapping[str, str | Sequence[str]]

# Characters of a text that are sent.
LONGEST = 4000
CUT = " [cut]"
# The client's own retries of requests that failed, and seconds that each may take.
RETRIES, SECONDS = 3, 60.0
# How often an answer that is no verdict is asked for.
TRIES = 2
ADVICE: dict[int, str] = {
    HTTPStatus.BAD_REQUEST: "it must take response_format json_schema; try another --judge.model",
    HTTPStatus.UNAUTHORIZED: "put its key into the environment as TRIMTAB_JUDGE_KEY",
    HTTPStatus.FORBIDDEN: "put a key that may use it into the environment as TRIMTAB_JUDGE_KEY",
    HTTPStatus.NOT_FOUND: "check --judge.model, and that --judge.url ends as the API does, mostly in /v1",
    HTTPStatus.TOO_MANY_REQUESTS: "lower --judge.concurrency, or try again later",
}


@dataclass(frozen=True)
class LlmClient:
    """`model` at `url` (up to and with /v1), asked at most `concurrency` things at a time.

    Its key comes from the environment alone: TRIMTAB_JUDGE_KEY, else OPENAI_API_KEY. Raises UsageError for what is no URL."""

    url: str
    model: str
    concurrency: int = 8

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.username or parts.password or parts.query:
            raise UsageError("--judge.url must hold no key: put it into the environment as TRIMTAB_JUDGE_KEY")
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise UsageError(f"--judge.url {self.url!r} is no URL like http://localhost:8000/v1")

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.model} at {self.url}"

    def rubric_digest(self, *what: Any) -> str:
        """A name for all that judgements depend on: the model, who serves it, and what it is told."""
        return f"endpoint {self.url} {self.model} {hashlib.sha256(json.dumps(what).encode()).hexdigest()[:12]}"

    def ask_all(self, rubric: str, schema: Mapping[str, Any], data: Sequence[Data], read: Callable[[Any], T | None]) -> list[T]:
        """What `read` makes of the reply about each of the data; JobError where one cannot be had, or `read` gives None for it
        time and again."""
        key = _key()
        with (
            OpenAI(base_url=self.url, api_key=key, timeout=SECONDS, max_retries=RETRIES) as client,
            ThreadPoolExecutor(self.concurrency) as pool,
        ):
            waiting = [pool.submit(self._ask_one, client, rubric, schema, one, read) for one in data]
            try:
                return [future.result() for future in waiting]
            except OpenAIError as error:
                pool.shutdown(wait=False, cancel_futures=True)
                said = " ".join(_said(error).replace(key, "***").split())[:300]
                raise JobError(f"judge {self.name}: {said}; {_advice(error)}") from error
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _ask_one(
        self, client: OpenAI, rubric: str, schema: Mapping[str, Any], data: Data, read: Callable[[Any], T | None]
    ) -> T:
        said = ""
        for _ in range(TRIES):
            said = _ask(client, self.model, rubric, schema, _sent(data))
            if (found := _parsed(said, read)) is not None:
                return found
        raise JobError(
            f"judge {self.name}: it said {said[:80]!r} where a verdict was to be; its endpoint must take response_format "
            "json_schema: try another --judge.model"
        )


def _ask(client: OpenAI, model: str, rubric: str, schema: Mapping[str, Any], data: str) -> str:
    """The text of the reply, drawn as firmly as the model lets it be."""
    options: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "system", "content": rubric}, {"role": "user", "content": data}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "verdict", "strict": True, "schema": dict(schema)}},
    }
    try:
        return _text(client.chat.completions.create(**options, temperature=0))
    except BadRequestError as error:
        # Reasoning models take no temperature but their own.
        if "temperature" not in str(error):
            raise
        return _text(client.chat.completions.create(**options))


def _text(reply: Any) -> str:
    """What the model said. The client takes replies of any shape, and so does this."""
    try:
        return reply.choices[0].message.content or ""
    except (AttributeError, IndexError, TypeError):
        return str(reply)


def _sent(data: Data) -> str:
    """Texts as JSON. Without a plain "<", no special token of a chat template can be in them."""
    texts = {name: _cut(text) if isinstance(text, str) else [_cut(part) for part in text] for name, text in data.items()}
    return json.dumps(texts, ensure_ascii=False).replace("<", "\\u003c")


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else text[:LONGEST] + CUT


def _parsed(said: str, read: Callable[[Any], T | None]) -> T | None:
    try:
        given = json.loads(said)
    except json.JSONDecodeError:
        return None
    return read(given) if isinstance(given, dict) else None


def _key() -> str:
    key = (os.environ.get("TRIMTAB_JUDGE_KEY") or os.environ.get("OPENAI_API_KEY") or "none").strip()
    # The HTTP client would show the key in its complaint.
    if not key.isascii() or not key.isprintable():
        raise UsageError("the key in TRIMTAB_JUDGE_KEY or OPENAI_API_KEY holds what no key can: set it again")
    return key


def _said(error: OpenAIError) -> str:
    """What the endpoint said, or what became of the connection."""
    if isinstance(error, APIConnectionError):
        return f"{error.message} ({error.__cause__ or 'no answer'})"
    return str(error)


def _advice(error: OpenAIError) -> str:
    if isinstance(error, APIStatusError):
        return ADVICE.get(error.status_code, "try again later; verdicts already given are kept")
    return "is it running, and does --judge.url lead to it?"
