"""Loads of versions: shared, remembered after a failure, limited in memory and isolated from damaged artifacts."""

import asyncio
import threading
import time
from dataclasses import dataclass

import pytest

from trimtab.engine.prefixes import version_loader
from trimtab.engine.prefixes.version_loader import RegisteredVersion, VersionLoader
from trimtab.errors import ArtifactError, TrackingError


@dataclass(frozen=True)
class SizedArtifact:
    nbytes: int = 1


class RecordingSource:
    """Source that records its loads, waits until it may go on, and fails with `error` if there is one."""

    is_cached = False

    def __init__(self) -> None:
        self.loads: list[int] = []
        self.error: Exception | None = None
        self.released = threading.Event()
        self.released.set()

    def list_versions(self):
        return []

    def load(self, version):
        self.loads.append(version.version)
        assert self.released.wait(30)
        if self.error is not None:
            raise self.error
        return SizedArtifact()


@pytest.fixture
def source():
    return RecordingSource()


def make_version(number: int) -> RegisteredVersion:
    return RegisteredVersion("mine", number, None)


async def accept_at(loader, number):
    return (await loader.load(make_version(number))).version.version


def build_loader(source, check=lambda artifact: None, **options):
    return VersionLoader(source, check, **options)


def test_simultaneous_requests_share_one_load(source):
    loader = build_loader(source)
    source.released.clear()

    async def run() -> None:
        tasks = [asyncio.create_task(accept_at(loader, 1)) for _ in range(40)]
        await asyncio.sleep(0)
        # One client leaves: the others still get their version.
        tasks[0].cancel()
        source.released.set()
        assert await asyncio.gather(*tasks[1:]) == [1] * 39

    asyncio.run(run())
    assert source.loads == [1]


@pytest.mark.parametrize("error", [KeyError("F4"), TypeError("x"), MemoryError(), ArtifactError("damaged")])
def test_failure_is_an_artifact_error_that_is_remembered(source, error, monkeypatch):
    loader = build_loader(source)
    source.error = error

    async def run() -> None:
        for _ in range(20):
            with pytest.raises(ArtifactError):
                await loader.load(make_version(1))
        assert source.loads == [1]
        source.error = None
        monkeypatch.setattr(version_loader, "RETRY_SECONDS", -1.0)
        assert await accept_at(loader, 2) == 2

    asyncio.run(run())


def test_version_is_loaded_again_after_the_retry_interval(source, monkeypatch):
    loader = build_loader(source)
    monkeypatch.setattr(version_loader, "RETRY_SECONDS", -1.0)
    monkeypatch.setattr(version_loader, "UNREACHABLE_SECONDS", -1.0)

    async def run() -> None:
        for error in (ArtifactError("damaged"), TrackingError("no registry")):
            source.error = error
            with pytest.raises(type(error)):
                await loader.load(make_version(1))
        source.error = None
        assert await accept_at(loader, 1) == 1

    asyncio.run(run())
    assert source.loads == [1, 1, 1]


def test_version_that_this_engine_cannot_use_is_not_held(source):
    def reject(artifact):
        raise ArtifactError("too many vectors")

    loader = build_loader(source, reject)
    with pytest.raises(ArtifactError, match="too many vectors"):
        asyncio.run(accept_at(loader, 1))
    assert loader.get_loaded(("mine", 1)) is None


def test_least_recently_used_versions_leave_beyond_the_memory_limit(source):
    loader = build_loader(source, max_idle_bytes=3)
    loader.pin({("mine", 1)})

    async def run() -> None:
        for number in (1, 2, 3, 4):
            await loader.load(make_version(number))
        assert loader.evict_unused() == []
        await loader.load(make_version(2))
        await loader.load(make_version(5))

    asyncio.run(run())
    assert [version.version for version in loader.evict_unused()] == [3]
    assert [loader.get_loaded(("mine", number)) is not None for number in (1, 2, 3, 4, 5)] == [True, True, False, True, True]


def test_idle_time_of_a_version_begins_when_it_is_no_longer_pinned(source, monkeypatch):
    loader = build_loader(source)
    loader.pin({("mine", 1)})
    asyncio.run(loader.load(make_version(1)))
    later = time.monotonic() + 2 * version_loader.IDLE_SECONDS
    monkeypatch.setattr(version_loader.time, "monotonic", lambda: later)
    loader.pin(frozenset())
    assert loader.evict_unused() == []


def test_loads_do_not_use_the_threads_of_requests(source):
    loader = build_loader(source)
    source.released.clear()

    async def run() -> None:
        tasks = [asyncio.create_task(accept_at(loader, number)) for number in range(64)]
        await asyncio.sleep(0)
        assert await asyncio.wait_for(asyncio.to_thread(lambda: "read"), 10) == "read"
        source.released.set()
        assert await asyncio.gather(*tasks) == list(range(64))

    asyncio.run(run())
