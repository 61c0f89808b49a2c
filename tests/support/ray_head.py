"""Ray head nodes in separate processes, at free ports."""

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
class RayHead:
    """Addresses of a head node for drivers and for the dashboard."""

    address: str
    dashboard: str


@contextmanager
def start_ray_head(
    port: int, *flags: str, environment: Mapping[str, str], token: str = "", dashboard: bool = True
) -> Generator[RayHead]:
    """Start a head node and yield it once it responds; kill it and its child processes at the end."""
    # The folder holds Ray's sockets, whose paths must be short.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        dashboard_port, client_port, agent_port = ports.find_free_ports(3)
        address, url = f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard_port}"
        command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--temp-dir", folder]
        command += ["--port", str(port), "--ray-client-server-port", str(client_port), "--include-dashboard", str(dashboard)]
        command += [
            "--dashboard-host",
            "127.0.0.1",
            "--dashboard-port",
            str(dashboard_port),
            "--dashboard-agent-listen-port",
            str(agent_port),
        ]
        with _run_process([*command, *flags], environment) as process:
            deadline = time.monotonic() + START_SECONDS
            while not (_responds(url, token) if dashboard else ports.explain_unavailable_port("127.0.0.1", port)):
                assert process.poll() is None
                assert time.monotonic() < deadline, "the Ray head did not start"
            yield RayHead(address, url)


@contextmanager
def _run_process(command: Sequence[str], environment: Mapping[str, str]) -> Generator[subprocess.Popen]:
    # The nodes must use the Python that has trimtab installed.
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
            processes = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            for child in processes:
                with suppress(psutil.NoSuchProcess):
                    child.kill()
            psutil.wait_procs(processes, timeout=30)


def _responds(url: str, token: str) -> bool:
    headers = {"authorization": f"Bearer {token}"} if token else {}
    try:
        return httpx.get(f"{url}/api/jobs/", headers=headers, timeout=5).is_success
    except httpx.HTTPError:
        return False
