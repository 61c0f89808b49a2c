"""The page at `/`: static files of this package, and the one thing that the page must be told."""

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
# Nothing of the outside, and nobody may put the page into another.
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
    """Headers and body of each page by its path."""
    folder = files("trimtab.serve") / "page"
    found = {path: _whole(TYPES[name.rpartition(".")[2]], (folder / name).read_bytes()) for path, name in NAMES.items()}
    return found | {ABOUT: _whole("application/json", json.dumps({"runs": _runs()}).encode())}


def _runs() -> str | None:
    """Where MLflow shows a run, but for its id; None where no server of MLflow is known."""
    uri = settings.get_shown_uri()
    if not uri.startswith(("http://", "https://")):
        return None
    try:
        with wrap_tracking_errors("find the experiment"):
            return f"{uri.rstrip('/')}/#/experiments/{quote(get_experiment_id())}/runs/"
    except TrimtabError:
        return None


def _whole(kind: str, body: bytes) -> tuple[Headers, bytes]:
    return [(b"content-type", kind.encode()), (b"content-length", str(len(body)).encode()), *HEADERS], body
