"""Static web page at `/` and its settings."""

import json
from importlib.resources import files
from urllib.parse import quote

from trimtab import settings
from trimtab.engine.asgi import Headers
from trimtab.errors import TrimtabError
from trimtab.tracking.client import get_experiment_id, wrap_tracking_errors

TYPES = {"html": "text/html; charset=utf-8", "css": "text/css; charset=utf-8", "js": "text/javascript; charset=utf-8"}
NAMES = {"/": "index.html", "/page.css": "page.css", "/page.js": "page.js"}
ABOUT = "/page.json"
# The page loads no external resources and cannot be embedded in other pages.
HEADERS = (
    (
        b"content-security-policy",
        b"default-src 'self'; style-src 'self' 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-cache"),
)


def load_page() -> dict[str, tuple[Headers, bytes]]:
    """Return headers and body of each file of the page by its URL path."""
    folder = files("trimtab.serve") / "page"
    return {path: _build_page(TYPES[name.rpartition(".")[2]], (folder / name).read_bytes()) for path, name in NAMES.items()}


def build_about(*, feedback: bool) -> tuple[Headers, bytes]:
    """Return headers and body of the page's data, which name the MLflow server: only clients with a key may read them.

    Args:
        feedback: whether the server takes feedback.
    """
    return _build_page("application/json", json.dumps({"runs": _get_runs_url(), "feedback": feedback}).encode())


def _get_runs_url() -> str | None:
    """Return the URL prefix of MLflow's run pages; None without an MLflow server."""
    uri = settings.get_shown_uri()
    if not uri.startswith(("http://", "https://")):
        return None
    try:
        with wrap_tracking_errors("find the experiment"):
            return f"{uri.rstrip('/')}/#/experiments/{quote(get_experiment_id())}/runs/"
    except TrimtabError:
        return None


def _build_page(content_type: str, body: bytes) -> tuple[Headers, bytes]:
    return [(b"content-type", content_type.encode()), (b"content-length", str(len(body)).encode()), *HEADERS], body
