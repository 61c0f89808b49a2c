"""MLflow server in its own process, which tests can kill and restart."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import httpx

from trimtab.util import ports

START_SECONDS = 120


class MlflowServer:
    """MLflow server on loopback. It stores runs in a database and artifacts in a folder."""

    def __init__(self, database: str, artifacts: Path) -> None:
        port = ports.find_free_ports()[0]
        self.uri = f"http://127.0.0.1:{port}"
        self._command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
        self._command += ["--backend-store-uri", database, "--artifacts-destination", str(artifacts)]
        self._process: subprocess.Popen | None = None

    def start(self) -> None:
        """Start the server and wait until it responds."""
        # Its job queue needs three more processes, which start slowly.
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(self._command, env=environment, start_new_session=True, **streams)
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            try:
                if httpx.get(f"{self.uri}/health", timeout=1).status_code == 200:
                    return
            except httpx.HTTPError:
                # Wait before the next request: requests slow the server's start.
                with suppress(subprocess.TimeoutExpired):
                    self._process.wait(0.3)
                assert self._process.poll() is None
        raise AssertionError("the MLflow server did not start")

    def kill(self) -> None:
        """Kill the server with SIGKILL, if it is running."""
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
