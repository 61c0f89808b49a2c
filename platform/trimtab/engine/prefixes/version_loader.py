"""Loader of artifacts into memory: one load per version, threads of its own, remembered failures and a memory limit."""

import asyncio
import time
from collections.abc import Callable, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Generic, Protocol, TypeVar

from trimtab.errors import ArtifactError, TrimtabError

# Time until a version that could not be used is loaded again: versions are immutable, but damaged files can be repaired.
RETRY_SECONDS = 30.0
# The same if the registry could not be reached.
UNREACHABLE_SECONDS = 5.0
# Time without a request after which a version without an alias is removed from memory.
IDLE_SECONDS = 600.0
# Memory of the versions without an alias. The least recently used ones are removed beyond it.
MAX_IDLE_BYTES = 1 << 30
# Number of simultaneous loads. Requests and the registry use other threads.
THREADS = 4


class Artifact(Protocol):
    """Prefix or detector."""

    @property
    def nbytes(self) -> int:
        """Size of the tensors in bytes."""
        ...


ArtifactT = TypeVar("ArtifactT", bound=Artifact)
ArtifactT_co = TypeVar("ArtifactT_co", bound=Artifact, covariant=True)
VersionKey = tuple[str, int]
"""Name and version number."""


@dataclass(frozen=True)
class RegisteredVersion:
    """A version in the registry.

    Attributes:
        name: name of the prefix or detector.
        version: version number.
        run_id: id of the MLflow run that trained it; None if unknown.
        aliases: aliases that refer to it.
    """

    name: str
    version: int
    run_id: str | None
    aliases: tuple[str, ...] = ()

    @property
    def key(self) -> VersionKey:
        """Name and version number."""
        return self.name, self.version


class ArtifactSource(Protocol[ArtifactT_co]):
    """Source of the artifacts of one kind. Its methods block, and are called in a thread."""

    @property
    def is_cached(self) -> bool:
        """Whether the versions come from a local copy, because the registry has not answered yet."""
        ...

    def list_versions(self) -> Sequence[RegisteredVersion]:
        """Return all versions for the base model."""
        ...

    def load(self, version: RegisteredVersion) -> ArtifactT_co:
        """Load the artifact of a version.

        Raises:
            ArtifactError: if the artifact is damaged or must not be used.
        """
        ...


@dataclass(frozen=True)
class LoadedVersion(Generic[ArtifactT]):
    """A version and its artifact (a prefix or detector) in memory."""

    version: RegisteredVersion
    artifact: ArtifactT


@dataclass(frozen=True)
class LoadFailure:
    """Failed load of a version.

    Attributes:
        error: reason.
        retry_at: time of the next attempt (seconds, monotonic clock).
    """

    error: TrimtabError
    retry_at: float


class VersionLoader(Generic[ArtifactT]):
    """Artifacts of one kind in memory.

    Args:
        source: source of the artifacts.
        check: raises ArtifactError for an artifact that this engine cannot use.
        max_idle_bytes: memory limit of the versions that are not pinned.
    """

    def __init__(
        self, source: ArtifactSource[ArtifactT], check: Callable[[ArtifactT], None], max_idle_bytes: int = MAX_IDLE_BYTES
    ) -> None:
        self._source = source
        self._check = check
        self._max_idle_bytes = max_idle_bytes
        self._loaded: dict[VersionKey, LoadedVersion[ArtifactT]] = {}
        self._used_at: dict[VersionKey, float] = {}
        self._loading: dict[VersionKey, asyncio.Task[LoadedVersion[ArtifactT]]] = {}
        self._failures: dict[VersionKey, LoadFailure] = {}
        self._pinned: Set[VersionKey] = frozenset()
        self._removed: list[RegisteredVersion] = []
        self._executor = ThreadPoolExecutor(THREADS, "trimtab-load")

    def get_loaded(self, key: VersionKey) -> LoadedVersion[ArtifactT] | None:
        """Return a version that is in memory and record its use; None for another one."""
        if (loaded := self._loaded.get(key)) is not None:
            self._used_at[key] = time.monotonic()
        return loaded

    async def load(self, version: RegisteredVersion) -> LoadedVersion[ArtifactT]:
        """Return a version, and load it if it is not in memory; simultaneous calls share one load.

        Raises:
            ArtifactError: if the artifact cannot be used. The error is raised again for RETRY_SECONDS without another attempt.
            TrackingError: if the registry cannot be reached.
        """
        if loaded := self.get_loaded(version.key):
            return loaded
        failure = self._failures.get(version.key)
        if failure is not None and time.monotonic() < failure.retry_at:
            raise failure.error.with_traceback(None)
        if (task := self._loading.get(version.key)) is None:
            task = self._loading[version.key] = asyncio.create_task(self._load(version))
            task.add_done_callback(partial(self._forget_task, version.key))
        # A request that is cancelled must not end the load for the others.
        return await asyncio.shield(task)

    def pin(self, keys: Set[VersionKey]) -> None:
        """Set the versions that stay in memory. The idle time of the others begins when they are no longer among them."""
        now = time.monotonic()
        self._used_at.update({key: now for key in self._pinned - keys if key in self._loaded})
        self._pinned = keys

    def evict_unused(self) -> list[RegisteredVersion]:
        """Remove the versions that are not pinned and had no request for IDLE_SECONDS.

        Returns:
            All versions that were removed since the last call, also those beyond the memory limit.
        """
        oldest = time.monotonic() - IDLE_SECONDS
        for key in self._list_idle():
            if self._used_at[key] < oldest:
                self._remove(key)
        now = time.monotonic()
        self._failures = {key: failure for key, failure in self._failures.items() if now < failure.retry_at}
        removed, self._removed = self._removed, []
        return removed

    async def _load(self, version: RegisteredVersion) -> LoadedVersion[ArtifactT]:
        loop = asyncio.get_running_loop()
        try:
            artifact = await loop.run_in_executor(self._executor, self._source.load, version)
            self._check(artifact)
        except Exception as error:
            raise self._record_failure(version, error) from error
        self._failures.pop(version.key, None)
        loaded = self._loaded[version.key] = LoadedVersion(version, artifact)
        self._used_at[version.key] = time.monotonic()
        self._evict_beyond_limit()
        return loaded

    def _forget_task(self, key: VersionKey, task: asyncio.Task[LoadedVersion[ArtifactT]]) -> None:
        del self._loading[key]
        # If all requests were cancelled, the error is not read, and asyncio would log it as lost.
        if not task.cancelled():
            task.exception()

    def _record_failure(self, version: RegisteredVersion, error: Exception) -> TrimtabError:
        """Return the error of a version, which is an ArtifactError whatever a damaged file caused."""
        if not isinstance(error, TrimtabError):
            error = ArtifactError(f"{version.name}@{version.version} cannot be loaded: {type(error).__name__} {error}")
        seconds = RETRY_SECONDS if isinstance(error, ArtifactError) else UNREACHABLE_SECONDS
        self._failures[version.key] = LoadFailure(error, time.monotonic() + seconds)
        return error

    def _evict_beyond_limit(self) -> None:
        idle = sorted(self._list_idle(), key=lambda key: self._used_at[key])
        total = sum(self._loaded[key].artifact.nbytes for key in idle)
        # The newest one stays: its request is about to use it.
        for key in idle[:-1]:
            if total <= self._max_idle_bytes:
                return
            total -= self._loaded[key].artifact.nbytes
            self._remove(key)

    def _list_idle(self) -> list[VersionKey]:
        return [key for key in self._loaded if key not in self._pinned]

    def _remove(self, key: VersionKey) -> None:
        self._removed.append(self._loaded.pop(key).version)
        del self._used_at[key]
