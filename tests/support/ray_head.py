"""Ray heads as processes of their own, at ports of their own."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from trimtab.util import ports

START_SECONDS = 120


@dataclass(frozen=True)
class Head:
    """Where drivers and the dashboard are reached."""

    address: str
    dashboard: str


@contextmanager
def head(port: int, *flags: str, environment: Mapping[str, str], token: str = "", dashboard: bool = True) -> Generator[Head]:
    """A head, up; down again at the end with all that it started. Without a dashboard it is up for drivers only."""
    # Ray's sockets are in it, and the path of a socket must be short.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        shown, clients, agent = ports.find_free_ports(3)
        address, url = f"127.0.0.1:{port}", f"http://127.0.0.1:{shown}"
        command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--temp-dir", folder]
        command += ["--port", str(port), "--ray-client-server-port", str(clients), "--include-dashboard", str(dashboard)]
        command += [
            "--dashboard-host",
            "127.0.0.1",
            "--dashboard-port",
            str(shown),
            "--dashboard-agent-listen-port",
            str(agent),
        ]
        with _running([*command, *flags], environment) as process:
            deadline = time.monotonic() + START_SECONDS
            while not (_answers(url, token) if dashboard else ports.explain_unavailable_port("127.0.0.1", port)):
                assert process.poll() is None
                assert time.monotonic() < deadline
            yield Head(address, url)


@contextmanager
def _running(command: Sequence[str], environment: Mapping[str, str]) -> Generator[subprocess.Popen]:
    # The nodes' python is the one that has trimtab.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    process = subprocess.Popen(
        command,
        env=os.environ | {"PATH": path} | dict(environment),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with suppress(psutil.NoSuchProcess):
            there = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            for each in there:
                with suppress(psutil.NoSuchProcess):
                    each.kill()
            psutil.wait_procs(there, timeout=30)


def _answers(url: str, token: str) -> bool:
    headers = {"authorization": f"Bearer {token}"} if token else {}
    try:
        return httpx.get(f"{url}/api/jobs/", headers=headers, timeout=5).is_success
    except httpx.HTTPError:
        return False
