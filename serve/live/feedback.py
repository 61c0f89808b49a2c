"""Feedback endpoint: `POST /v1/feedback` stores whether an answer was right, or a prompt harmful."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from typing import Any

from trimtab.detection.live_labels import LABEL_NAMES, LabelJournal, LabelName, LiveLabel, build_label
from trimtab.engine import asgi
from trimtab.engine.asgi import App, Receive, Scope, Send
from trimtab.engine.metrics import FEEDBACK
from trimtab.engine.protocols.errors import send_error, send_failure
from trimtab.engine.protocols.paths import FEEDBACK_PATH
from trimtab.engine.request_context import RequestContext
from trimtab.errors import TrimtabError, UsageError
from trimtab.serve.live.answer_ids import FORM, AnswerIds
from trimtab.serve.middleware.rate_window import RateWindow

FIELDS = frozenset({"id", "choice", "correct", "harmful", "rater"})
# Maximum index of a choice, and length of the name of a rater in characters.
MAX_CHOICE, MAX_RATER = 127, 64
# Labels of one API key per hour on each replica. An operator who labels in bulk uses a trusted key.
MOST_PER_HOUR, HOUR = 1000, 3600.0


class FeedbackMiddleware:
    """ASGI middleware that signs request ids, and stores the labels that clients send for them.

    Args:
        app: wrapped ASGI app.
        ids: signer of the request ids.
        journal: journal of the labels.
        assess: called with each stored label; None to do nothing.
    """

    def __init__(
        self, app: App, ids: AnswerIds, journal: LabelJournal, assess: Callable[[LiveLabel], None] | None = None
    ) -> None:
        self._app = app
        self._ids = ids
        self._journal = journal
        self._assess = assess
        self._labels = RateWindow(HOUR)
        self._executor = ThreadPoolExecutor(1, "trimtab-labels")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Store a label, or forward another request with a signed id."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        context = RequestContext.get(scope, receive, send)
        key = context.notes.get("key")
        context.server_id = self._ids.sign_id(context.server_id, key)
        if scope["path"].rstrip("/") != FEEDBACK_PATH:
            await self._app(scope, receive, send)
            return
        try:
            asgi.check_json_type(scope)
            if (body := await context.read_json()) is None:
                return
            label = parse_label(body, key, trusted=context.rights.rates)
        except TrimtabError as error:
            await send_error(context.send, FEEDBACK_PATH, error)
            return
        if not context.rights.rates and not self._ids.is_owner(label.id, key):
            message = "this API key did not send the request with this id. Use the key that sent it, or a key for raters"
            await send_failure(context.send, FEEDBACK_PATH, HTTPStatus.FORBIDDEN, message)
        elif not context.rights.rates and self._labels.count_event(key or "", MOST_PER_HOUR):
            message = f"more than {MOST_PER_HOUR} labels per hour. Use a key for raters: trimtab keys add NAME --rater true"
            await send_failure(context.send, FEEDBACK_PATH, HTTPStatus.TOO_MANY_REQUESTS, message, [(b"retry-after", b"60")])
        else:
            await self._store_label(label, context)

    async def _store_label(self, label: LiveLabel, context: RequestContext) -> None:
        try:
            await asyncio.get_running_loop().run_in_executor(self._executor, self._journal.append_label, label)
        except (OSError, TrimtabError) as error:
            message = f"the label was not stored: {error}. Send it again later"
            await send_failure(context.send, FEEDBACK_PATH, HTTPStatus.SERVICE_UNAVAILABLE, message, [(b"retry-after", b"10")])
            return
        FEEDBACK.labels(str(label.correct).lower()).inc()
        if self._assess is not None:
            self._assess(label)
        about = (
            {"harmful": not label.correct} if label.subject == "prompt" else {"choice": label.choice, "correct": label.correct}
        )
        stored = {"object": "feedback", "id": label.id, **about, "rater": label.rater}
        await asgi.send_json(context.send, HTTPStatus.OK, stored)


def parse_label(body: dict[str, Any], key: str | None, *, trusted: bool) -> LiveLabel:
    """Parse the body of a feedback request.

    Args:
        body: request body.
        key: name of the API key; None for a server without keys.
        trusted: whether the key belongs to a rater that the operator trusts.

    Raises:
        UsageError: if a field is unknown or invalid.
    """
    if unknown := sorted(body.keys() - FIELDS):
        raise UsageError(f"feedback has no field {unknown[0][:80]!r}. Fields: {', '.join(sorted(FIELDS))}")
    request_id, choice, rater = body.get("id"), body.get("choice", 0), body.get("rater")
    named: list[LabelName] = [name for name in LABEL_NAMES if body.get(name) is not None]
    if not isinstance(request_id, str) or not FORM.fullmatch(request_id):
        raise UsageError("id must be the x-trimtab-request-id header of the response that the feedback is about")
    if type(choice) is not int or not 0 <= choice <= MAX_CHOICE:
        raise UsageError(f"choice must be the index of an answer, from 0 to {MAX_CHOICE}")
    if len(named) != 1 or not isinstance(value := body[named[0]], bool):
        raise UsageError("feedback needs correct (about the answer) or harmful (about the prompt), true or false")
    if rater is not None and not (isinstance(rater, str) and 0 < len(rater) <= MAX_RATER):
        raise UsageError(f"rater must be a name of 1 to {MAX_RATER} characters")
    name = "/".join(filter(None, (key, rater))) or "anonymous"
    return build_label(named[0], request_id, choice, name, value=value, trusted=trusted)
