"""Command `trimtab ui`: MLflow's web pages on the store that trimtab uses."""

import os
import subprocess
import sys

from trimtab import settings
from trimtab.cli.commands import UiConfig
from trimtab.cli.console import print_line
from trimtab.errors import JobError, UsageError
from trimtab.tracking.client import get_experiment_id, wrap_tracking_errors
from trimtab.util import ports

LOOPBACK = "127.0.0.1"


def run_ui(config: UiConfig) -> None:
    """Run MLflow's web server until Ctrl-C.

    If the store is an MLflow server, print its address instead.

    Raises:
        UsageError: if the port is not available.
        TrackingError: if the store cannot be opened.
        JobError: if the web server fails.
    """
    uri = settings.get_tracking_uri()
    if uri.startswith(("http://", "https://")):
        print_line(f"MLFLOW_TRACKING_URI is an MLflow server. Open its web pages: {settings.get_shown_uri()}")
        return
    if reason := ports.explain_unavailable_port(LOOPBACK, config.port):
        raise UsageError(f"cannot listen on {LOOPBACK}:{config.port} ({reason}). Choose another --port")
    # Creates the experiment in a new store, so that the printed address exists.
    with wrap_tracking_errors("open the store"):
        experiment = get_experiment_id()
    print_line(f"http://{LOOPBACK}:{config.port}/#/experiments/{experiment} (stop with Ctrl-C)")
    command = [sys.executable, "-m", "mlflow", "server", "--host", LOOPBACK, "--port", str(config.port), "--workers", "1"]
    # Passed by environment: other users can read command lines, and the address may contain a password.
    process = subprocess.Popen(command, env=os.environ | {"MLFLOW_BACKEND_STORE_URI": uri})
    try:
        code = process.wait()
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        return
    if code:
        raise JobError(f"MLflow ended with exit code {code}")
