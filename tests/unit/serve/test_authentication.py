"""API keys: key files, their commands, and the authentication of requests."""

import asyncio
import json
import shutil
import threading

import httpx
import pytest

from tests.support.api_keys import create_key
from trimtab.engine import asgi
from trimtab.engine.context import tenant
from trimtab.engine.request_context import RequestContext
from trimtab.serve.api_keys import read_keys
from trimtab.serve.middleware import authentication, rate_window
from trimtab.serve.middleware.authentication import AuthenticationMiddleware, OpenPathMiddleware


async def echo(scope, receive, send):
    """Respond with path and body of the request; at /slow wait for `release_slow` first."""
    context = RequestContext.get(scope, receive, send)
    body = await context.read_body()
    if scope["path"] == "/slow":
        await release_slow.wait()
    await asgi.send_json(context.send, 200, {"path": scope["path"], "body": body.decode()})


release_slow = asyncio.Event()
MAX_CONCURRENT = 8


@pytest.fixture
def key_file(tmp_path):
    return tmp_path / "keys.json"


def send_requests(key_file, *requests):
    """Send requests of (method, path, token, body) one after the other and return the responses."""

    async def run():
        transport = httpx.ASGITransport(AuthenticationMiddleware(echo, key_file, MAX_CONCURRENT))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return [
                await client.request(method, path, json=body, headers={"authorization": f"Bearer {token}"} if token else {})
                for method, path, token, body in requests
            ]

    return asyncio.run(run())


def test_requests_need_a_valid_key(key_file):
    token = create_key(key_file)
    rejected = send_requests(
        key_file,
        ("GET", "/v1/models", None, None),
        ("GET", "/v1/models", "tt-wrong", None),
        ("GET", "/metrics", "", None),
        ("POST", "/v1/chat/completions", token[:-1], {"model": "m"}),
    )
    assert [response.status_code for response in rejected] == [401] * 4
    assert rejected[0].json()["error"]["type"] == "AuthenticationError"
    assert rejected[0].headers["www-authenticate"] == "Bearer"
    accepted = send_requests(
        key_file,
        ("GET", "/v1/models", token, None),
        ("POST", "/v1/chat/completions", token, {"model": "m"}),
        ("GET", "/", None, None),
        ("GET", "/health", None, None),
    )
    assert [response.status_code for response in accepted] == [200] * 4
    assert json.loads(accepted[1].json()["body"]) == {"model": "m"}


def test_anthropics_header_holds_a_key(key_file):
    token = create_key(key_file, models=["m"])

    async def run():
        transport = httpx.ASGITransport(AuthenticationMiddleware(echo, key_file, MAX_CONCURRENT))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return [
                await client.post("/v1/messages", json={"model": model}, headers=headers)
                for model, headers in (
                    ("m", {"x-api-key": token}),
                    ("m", {"x-api-key": token[:-1]}),
                    ("m", {"x-api-key": ""}),
                    ("m", {"x-api-key": token, "authorization": "Bearer tt-wrong"}),
                    ("other", {"x-api-key": token}),
                )
            ]

    accepted, *rejected = asyncio.run(run())
    assert accepted.status_code == 200
    assert [response.status_code for response in rejected] == [401, 401, 401, 403]
    types = [response.json()["error"]["type"] for response in rejected]
    assert types == ["authentication_error"] * 3 + ["permission_error"]
    assert all(response.json()["type"] == "error" for response in rejected)


def test_key_allows_only_its_models(key_file):
    token = create_key(key_file, models=["base", "base:mine*"])
    bodies = [{"model": name} for name in ("base", "base:mine", "base:mine@3", "base:other", "other", 5)]
    responses = send_requests(key_file, *(("POST", "/v1/chat/completions", token, body) for body in [*bodies, {}, [1]]))
    assert [response.status_code for response in responses] == [200, 200, 200, 403, 403, 403, 403, 400]
    assert responses[3].json()["error"]["message"] == 'key alice allows base, base:mine*, not "base:other"'
    assert responses[6].json()["error"]["message"].endswith("not a request without a model name")
    assert json.loads(responses[2].json()["body"]) == {"model": "base:mine@3"}


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_open_paths_accept_get_and_head_only(key_file, method):
    """Nothing is read or counted: a body that never arrives does not occupy the server."""
    create_key(key_file)
    calls = []

    async def app(scope, receive, send):
        calls.append(scope["path"])
        await asgi.send_json(send, 200, {})

    async def run():
        transport = httpx.ASGITransport(OpenPathMiddleware(app))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            paths = ("/", "/health", "/ping", "/health/", "/page.js", "/page.css")
            rejected = [await client.request(method, path, content=b"x") for path in paths]
            return rejected, [await client.get("/health"), await client.head("/ping"), await client.post("/v1/models")]

    rejected, accepted = asyncio.run(run())
    assert [response.status_code for response in rejected] == [405] * 6
    assert rejected[0].headers["allow"] == "GET, HEAD"
    assert [response.status_code for response in accepted] == [200] * 3
    assert calls == ["/health", "/ping", "/v1/models"]


def test_key_file_that_vanishes_does_not_invalidate_its_keys(key_file, monkeypatch, caplog):
    monkeypatch.setattr("trimtab.serve.middleware.authentication.READ_SECONDS", 0.0)
    token = create_key(key_file)
    middleware = AuthenticationMiddleware(echo, key_file, MAX_CONCURRENT)

    async def get() -> int:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(middleware), base_url="http://test") as client:
            return (await client.get("/v1/models", headers={"authorization": f"Bearer {token}"})).status_code

    key_file.rename(key_file.with_name("moved.json"))
    assert asyncio.run(get()) == 200
    assert "is gone" in caplog.text
    key_file.write_text('{"keys": []}')
    assert asyncio.run(get()) == 401, "an empty key file has no valid keys"


def test_models_of_a_key_apply_to_posts_only(key_file):
    limited, unlimited = create_key(key_file, models=["base"]), create_key(key_file, "bob")
    requests = [("GET", "/v1/models", limited, None), ("POST", "/v1/chat/completions", unlimited, {})]
    assert [response.status_code for response in send_requests(key_file, *requests)] == [200, 200]


def test_only_the_star_of_a_pattern_is_special(key_file):
    token = create_key(key_file, models=["base:a[1]", "base:b?"])
    bodies = [{"model": name} for name in ("base:a[1]", "base:a1", "base:b?", "base:bc")]
    responses = send_requests(key_file, *(("POST", "/v1/chat/completions", token, body) for body in bodies))
    assert [response.status_code for response in responses] == [200, 403, 200, 403]


def test_metrics_need_a_permission(key_file):
    user, monitor = create_key(key_file), create_key(key_file, "prometheus", metrics=True)
    requests = [("GET", path, token, None) for token in (user, monitor) for path in ("/metrics", "/metrics/", "/v1/models")]
    responses = send_requests(key_file, *requests)
    assert [response.status_code for response in responses] == [403, 403, 200, 200, 200, 200]
    assert "--metrics true" in responses[0].json()["error"]["message"]


def test_server_without_keys_requires_them_from_the_first_one(key_file, monkeypatch):
    monkeypatch.setattr("trimtab.serve.middleware.authentication.READ_SECONDS", 0.0)
    middleware = AuthenticationMiddleware(echo, key_file, MAX_CONCURRENT)

    async def get(token: str = "") -> int:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(middleware), base_url="http://test") as client:
            return (await client.get("/v1/models", headers={"authorization": f"Bearer {token}"})).status_code

    assert asyncio.run(get()) == 200
    token = create_key(key_file)
    assert [asyncio.run(get()), asyncio.run(get(token))] == [401, 200]
    key_file.unlink()
    assert [asyncio.run(get()), asyncio.run(get(token))] == [401, 200]


@pytest.mark.parametrize("share_cache", [False, True])
def test_keys_have_their_own_cache_unless_it_is_shared(key_file, share_cache):
    tokens = [create_key(key_file, name) for name in ("alice", "bob")]
    salts: list[str | None] = []

    async def app(scope, receive, send):
        salts.append(tenant.get())
        await asgi.send_json(send, 200, {})

    async def run() -> None:
        middleware = AuthenticationMiddleware(app, key_file, MAX_CONCURRENT, share_cache=share_cache)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(middleware), base_url="http://test") as client:
            for token in (*tokens, tokens[0]):
                await client.get("/v1/models", headers={"x-api-key": token})

    asyncio.run(run())
    if share_cache:
        assert salts == [None] * 3
    else:
        assert salts[0] == salts[2] != salts[1]
        assert all(salts)


def test_mounted_secret_rotates_without_a_rejected_request(tmp_path, monkeypatch):
    """As kubelet does it: a new folder, a link to it that replaces the old link, and the old folder removed."""
    monkeypatch.setattr(authentication, "READ_SECONDS", 0.0)
    first, second = tmp_path / "..2026_01", tmp_path / "..2026_02"
    for folder in (first, second):
        folder.mkdir()
    token = create_key(first / "keys.json")
    (tmp_path / "..data").symlink_to(first.name)
    (tmp_path / "keys.json").symlink_to("..data/keys.json")
    shutil.copy(first / "keys.json", second / "keys.json")
    added = create_key(second / "keys.json", "bob")
    middleware = AuthenticationMiddleware(echo, tmp_path / "keys.json", MAX_CONCURRENT)

    async def get(key: str) -> int:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(middleware), base_url="http://test") as client:
            return (await client.get("/v1/models", headers={"x-api-key": key})).status_code

    assert [asyncio.run(get(key)) for key in (token, added)] == [200, 401]
    (tmp_path / "..data_tmp").symlink_to(second.name)
    (tmp_path / "..data_tmp").rename(tmp_path / "..data")
    assert asyncio.run(get(token)) == 200
    shutil.rmtree(first)
    assert [asyncio.run(get(key)) for key in (token, added)] == [200, 200]


def test_simultaneous_requests_wait_for_a_changed_key_file(key_file, monkeypatch):
    monkeypatch.setattr(authentication, "READ_SECONDS", 0.0)
    token, released = create_key(key_file), threading.Event()
    middleware = AuthenticationMiddleware(echo, key_file, MAX_CONCURRENT)

    def read_slowly(path):
        assert released.wait(30)
        return read_keys(path)

    async def run() -> list[int]:
        transport = httpx.ASGITransport(middleware)
        async with httpx.AsyncClient(transport=transport, base_url="http://test", headers={"x-api-key": token}) as client:
            tasks = [asyncio.create_task(client.get("/v1/models")) for _ in range(4)]
            for _ in range(20):
                await asyncio.sleep(0)
            released.set()
            return [response.status_code for response in await asyncio.gather(*tasks)]

    monkeypatch.setattr(authentication, "read_keys", read_slowly)
    key_file.write_text('{"keys": []}')
    assert asyncio.run(run()) == [401] * 4


def test_rate_limit_gives_429_with_retry_after(key_file):
    limited, unlimited = create_key(key_file, per_minute=2), create_key(key_file, "bob")
    requests = [("GET", "/v1/models", token, None) for token in (limited, limited, limited, unlimited)]
    responses = send_requests(key_file, *requests)
    assert [response.status_code for response in responses] == [200, 200, 429, 200]
    assert 1 <= int(responses[2].headers["retry-after"]) <= 60
    assert "2 requests per minute" in responses[2].json()["error"]["message"]


def test_rate_limit_counts_the_last_minute(key_file, monkeypatch):
    headers = {"x-api-key": create_key(key_file, per_minute=2)}

    async def run() -> list[tuple[int, str | None]]:
        transport = httpx.ASGITransport(AuthenticationMiddleware(echo, key_file, MAX_CONCURRENT))
        responses = []
        async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers) as client:
            for seconds in (0.0, 30.0, 59.0, 60.0, 61.0, 90.0):
                monkeypatch.setattr(rate_window, "monotonic", lambda seconds=seconds: seconds)
                response = await client.get("/v1/models")
                responses.append((response.status_code, response.headers.get("retry-after")))
        return responses

    assert asyncio.run(run()) == [(200, None), (200, None), (429, "1"), (200, None), (429, "29"), (200, None)]


@pytest.mark.parametrize("limit", [1, 0])
def test_concurrency_limit_gives_429(key_file, monkeypatch, limit):
    """A key without a limit has that of the server."""
    monkeypatch.setattr("tests.unit.serve.test_authentication.MAX_CONCURRENT", 1)
    token = create_key(key_file, concurrent=limit)

    async def run():
        global release_slow
        release_slow = asyncio.Event()
        transport = httpx.ASGITransport(AuthenticationMiddleware(echo, key_file, MAX_CONCURRENT))
        async with httpx.AsyncClient(
            transport=transport, base_url="http://test", headers={"authorization": f"Bearer {token}"}
        ) as client:
            first = asyncio.create_task(client.get("/slow"))
            while (second := await client.get("/x")).status_code == 200 and not first.done():
                await asyncio.sleep(0)
            release_slow.set()
            return (await first).status_code, second.status_code, (await client.get("/x")).status_code

    assert asyncio.run(run()) == (200, 429, 200)


def test_removed_key_is_rejected_and_damaged_file_is_ignored(key_file, monkeypatch):
    monkeypatch.setattr("trimtab.serve.middleware.authentication.READ_SECONDS", 0.0)
    token = create_key(key_file)

    async def run():
        transport = httpx.ASGITransport(AuthenticationMiddleware(echo, key_file, MAX_CONCURRENT))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            headers, statuses = {"authorization": f"Bearer {token}"}, []
            valid = key_file.read_text()
            for text in (valid, "{", '{"keys": 5}', '{"keys": []}'):
                key_file.write_text(text)
                statuses.append((await client.get("/v1/models", headers=headers)).status_code)
            return statuses

    assert asyncio.run(run()) == [200, 200, 200, 401]
