"""A real MLflow server as a process of its own, which can be killed and started again."""

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
    """Keeps what it is told in `store`, and files in a folder."""

    def __init__(self, store: str, files: Path) -> None:
        port = ports.find_free_ports()[0]
        self.uri = f"http://127.0.0.1:{port}"
        self._command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
        self._command += ["--backend-store-uri", store, "--artifacts-destination", str(files)]
        self._process: subprocess.Popen | None = None

    def start(self) -> None:
        """Up, and answering."""
        # Its queue of jobs is three processes more that take long to start.
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(self._command, env=environment, start_new_session=True, **quiet)
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            try:
                if httpx.get(f"{self.uri}/health", timeout=1).status_code == 200:
                    return
            except httpx.HTTPError:
                # Not at once again, which would slow the server's start.
                with suppress(subprocess.TimeoutExpired):
                    self._process.wait(0.3)
                assert self._process.poll() is None
        raise AssertionError("the MLflow server did not start")

    def kill(self) -> None:
        """Gone, as by `kill -9`; no harm where it is not there."""
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
