"""API keys: made, kept as hashes, and asked for at the door."""

import asyncio
import json
import stat

import httpx
import pytest
from ray import serve

from trimtab.cli.main import main
from trimtab.engine import asgi
from trimtab.engine.request_context import RequestContext
from trimtab.errors import ArtifactError, NotFoundError, UsageError
from trimtab.serve import app
from trimtab.serve.api_keys import (
    AddConfig,
    RemoveConfig,
    get_default_path,
    get_required_key_file,
    hash_key,
    read_keys,
    run_keys_add,
    run_keys_remove,
)
from trimtab.serve.config import ServeConfig
from trimtab.serve.middleware.authentication import AuthenticationMiddleware
from trimtab.util import ports


async def echo(scope, receive, send):
    """The server inside: answers with the body it got, after a moment where it is asked to wait."""
    context = RequestContext.get(scope, receive, send)
    body = await context.read_body()
    if scope["path"] == "/slow":
        await waiting.wait()
    await asgi.send_json(context.send, 200, {"path": scope["path"], "body": body.decode()})


waiting = asyncio.Event()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "keys.json"


@pytest.mark.usefixtures("cluster")
def test_a_config_file_that_opens_the_server_needs_keys(home):
    """Its `http_options` say where Serve listens, and its `args` nothing of that."""
    serve.start(http_options={"host": "0.0.0.0", "port": ports.find_free_ports()[0]})
    try:
        with pytest.raises(UsageError, match=r"the server on 0.0.0.0 would be open to other machines"):
            app.build_app({})
        run_keys_add(AddConfig("alice"))
        assert app.build_app({"cpus_per_replica": 1})
    finally:
        serve.shutdown()


def made(path, name="alice", **options):
    return run_keys_add(AddConfig(name, file=str(path), **options))["key"]


def asked(path, *requests):
    """Responses to requests of (method, path, token, body), one after the other."""

    async def run():
        transport = httpx.ASGITransport(AuthenticationMiddleware(echo, path))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return [
                await client.request(method, where, json=body, headers={"authorization": f"Bearer {token}"} if token else {})
                for method, where, token, body in requests
            ]

    return asyncio.run(run())


def test_only_the_hash_of_a_key_is_kept_and_only_its_owner_reads_it(path, capsys):
    token = made(path)
    assert token in capsys.readouterr().out
    assert token not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    (key,) = read_keys(path)
    assert key.digest == hash_key(token)
    assert main(["keys", "list", "--file", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "alice" in shown
    assert key.digest not in shown
    with pytest.raises(UsageError, match="a key named 'alice' already exists"):
        made(path)
    run_keys_remove(RemoveConfig("alice", file=str(path)))
    assert read_keys(path) == []
    with pytest.raises(NotFoundError, match="no key 'alice'"):
        run_keys_remove(RemoveConfig("alice", file=str(path)))


def test_nobody_comes_in_without_a_key(path):
    token = made(path)
    refused = asked(
        path,
        ("GET", "/v1/models", None, None),
        ("GET", "/v1/models", "tt-wrong", None),
        ("GET", "/metrics", "", None),
        ("POST", "/v1/chat/completions", token[:-1], {"model": "m"}),
    )
    assert [reply.status_code for reply in refused] == [401] * 4
    assert refused[0].json()["error"]["type"] == "AuthenticationError"
    assert refused[0].headers["www-authenticate"] == "Bearer"
    welcome = asked(
        path,
        ("GET", "/v1/models", token, None),
        ("POST", "/v1/chat/completions", token, {"model": "m"}),
        ("GET", "/", None, None),
        ("GET", "/health", None, None),
    )
    assert [reply.status_code for reply in welcome] == [200] * 4
    assert json.loads(welcome[1].json()["body"]) == {"model": "m"}


def test_a_key_asks_for_its_models_only(path):
    token = made(path, models=["base", "base:mine*"])
    body = [{"model": name} for name in ("base", "base:mine", "base:mine@3", "base:other", "other", 5)]
    replies = asked(path, *(("POST", "/v1/chat/completions", token, b) for b in [*body, {}, [1]]))
    assert [reply.status_code for reply in replies] == [200, 200, 200, 403, 403, 403, 403, 400]
    assert "key alice allows base, base:mine*, not" in replies[3].json()["error"]["message"]
    assert json.loads(replies[2].json()["body"]) == {"model": "base:mine@3"}


def test_too_many_requests_are_429_with_the_time_to_wait(path):
    token, other = made(path, per_minute=2), made(path, "bob")
    replies = asked(path, *(("GET", "/v1/models", token, None),) * 3, ("GET", "/v1/models", other, None))
    assert [reply.status_code for reply in replies] == [200, 200, 429, 200]
    assert 1 <= int(replies[2].headers["retry-after"]) <= 60
    assert "2 requests per minute" in replies[2].json()["error"]["message"]


def test_too_many_at_the_same_time_are_429(path):
    token = made(path, concurrent=1)

    async def run():
        waiting.clear()
        transport = httpx.ASGITransport(AuthenticationMiddleware(echo, path))
        async with httpx.AsyncClient(
            transport=transport, base_url="http://test", headers={"authorization": f"Bearer {token}"}
        ) as client:
            first = asyncio.create_task(client.get("/slow"))
            while (second := await client.get("/x")).status_code == 200 and not first.done():
                await asyncio.sleep(0)
            waiting.set()
            return (await first).status_code, second.status_code, (await client.get("/x")).status_code

    assert asyncio.run(run()) == (200, 429, 200)


def test_a_key_that_is_taken_away_is_turned_down_and_damage_changes_nothing(path, monkeypatch):
    monkeypatch.setattr("trimtab.serve.middleware.authentication.READ_SECONDS", 0.0)
    token = made(path)

    async def run():
        transport = httpx.ASGITransport(AuthenticationMiddleware(echo, path))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            headers, found = {"authorization": f"Bearer {token}"}, []
            whole = path.read_text()
            for text in (whole, "{", '{"keys": 5}', '{"keys": []}'):
                path.write_text(text)
                found.append((await client.get("/v1/models", headers=headers)).status_code)
            return found

    assert asyncio.run(run()) == [200, 200, 200, 401]


def test_files_and_settings_that_cannot_be_are_refused_in_one_line(home):
    path = home / "damaged.json"
    path.write_text('{"keys": [{"name": "x"}]}')
    with pytest.raises(ArtifactError, match=r"is not a key file\. Create one with trimtab keys add"):
        read_keys(path)
    with pytest.raises(UsageError, match="limits of at least 0"):
        AddConfig("x", per_minute=-1)
    with pytest.raises(UsageError, match=r"no API keys in .*\. Create one with trimtab keys add NAME"):
        get_required_key_file(ServeConfig(api_key_file=str(home / "none.json")))
    with pytest.raises(UsageError, match=r"the server on 0\.0\.0\.0 would be open to other machines"):
        get_required_key_file(ServeConfig(host="0.0.0.0"))
    assert get_required_key_file(ServeConfig(host="0.0.0.0", allow_unauthenticated=True)) is None
    assert get_required_key_file(ServeConfig()) is None
    run_keys_add(AddConfig("alice"))
    assert get_required_key_file(ServeConfig()) == str(get_default_path())
