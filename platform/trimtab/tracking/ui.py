"""`trimtab ui`: MLflow's own pages on the store that trimtab uses."""

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
    """Serve the pages until Ctrl-C, or name the server that has them already."""
    uri = settings.get_tracking_uri()
    if uri.startswith(("http://", "https://")):
        print_line(f"MLFLOW_TRACKING_URI names a server, which has the pages: {settings.get_shown_uri()}")
        return
    if why := ports.explain_unavailable_port(LOOPBACK, config.port):
        raise UsageError(f"cannot listen on {LOOPBACK}:{config.port} ({why}); choose another --port")
    # Made on first use, so that a fresh store has what the address names.
    with wrap_tracking_errors("open the store"):
        experiment = get_experiment_id()
    print_line(f"http://{LOOPBACK}:{config.port}/#/experiments/{experiment} (Ctrl-C ends it)")
    command = [sys.executable, "-m", "mlflow", "server", "--host", LOOPBACK, "--port", str(config.port), "--workers", "1"]
    # By the environment: anyone on this machine sees a command line, and an address may hold a password.
    process = subprocess.Popen(command, env=os.environ | {"MLFLOW_BACKEND_STORE_URI": uri})
    try:
        code = process.wait()
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        return
    if code:
        raise JobError(f"MLflow ended with exit code {code}")
