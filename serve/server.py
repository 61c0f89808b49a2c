"""Command `trimtab serve`: start, supervision and shutdown of the server.

trimtab serve --base smollm2-135m --port 8000
curl localhost:8000/v1/models
"""

import logging
import os
import threading
import time
from collections.abc import Generator, Iterable
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from http import HTTPStatus
from io import StringIO
from typing import Any

import httpx
import psutil
import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import HTTPOptions

from trimtab import settings
from trimtab.cli.console import ProgressBar, print_line
from trimtab.engine.vllm_ext import args
from trimtab.errors import JobError, UsageError
from trimtab.model.base_model import resolve_base_model
from trimtab.ray_connection import (
    LOCAL,
    check_resources,
    connect_to_ray,
    find_missing_resources,
    get_address,
    get_max_node_cores,
)
from trimtab.ray_patches import patch_haproxy_options
from trimtab.serve.api_keys import get_required_key_file
from trimtab.serve.app import build_application, get_proxy_address
from trimtab.serve.config import ServeConfig
from trimtab.serve.registry.sources import open_sources
from trimtab.util import ports
from trimtab.util.termination import defer_interrupt

APPLICATION = "trimtab"
# Processes of a local Ray that are not restarted.
RAY = ("gcs_server", "raylet")
POLL_SECONDS = 0.5
# Time for replicas to stop after their last request.
STOP_SECONDS = 30


def run_serve(config: ServeConfig) -> None:
    """Run `trimtab serve` until SIGINT or SIGTERM, then finish the running requests; a second signal stops at once.

    Raises:
        KeyboardInterrupt: on the second signal.
        UsageError: if the settings are invalid or the port is taken.
        JobError: if the replicas do not start, or a Ray process dies.
    """
    # The command line gives SIGTERM the effect of SIGINT.
    with defer_interrupt() as stop_event, serving(config, stop_event) as url:
        if not stop_event.is_set():
            print_line(f"ready: {url}/v1   page: {url}/   {_format_models(config, url)}")
            print_line("press Ctrl-C to stop")
        ray_processes = _list_ray_processes()
        while not stop_event.wait(POLL_SECONDS):
            for process, name in ray_processes.items():
                if _is_dead(process):
                    raise JobError(f"Ray process {name} has died, and the server with it. Start the server again")
        print_line("stopping")


@contextmanager
def serving(config: ServeConfig, stop_event: threading.Event | None = None) -> Generator[str]:
    """Start a server, yield its URL once it is ready, and shut it down at the end.

    Args:
        config: settings of the server.
        stop_event: event that aborts the wait for the server.

    Raises:
        UsageError: if the settings are invalid or the port is taken.
        JobError: if Serve or the replicas do not start.
    """
    print_line(f"base model {config.base} (the first time it is downloaded)")
    base = resolve_base_model(config.base, config.revision)
    args.check_engine_config(base, config.engine)
    open_sources(base, config.registry)
    config = replace(config, api_key_file=get_required_key_file(config))
    _check_port(config.host, config.port)
    owns_ray = _connect(config)
    ray_processes = _list_ray_processes()
    try:
        config = _check_running_server(config)
    except UsageError:
        if owns_ray:
            ray.shutdown()
        raise
    try:
        cpus = config.cpus_per_replica or get_max_node_cores() / max(config.num_replicas, config.max_replicas)
        resources = config.num_replicas * cpus, config.num_replicas * config.gpus_per_replica
        check_resources("serving", *resources)
        try:
            serve.start(http_options=HTTPOptions(host=config.host, port=config.port, request_timeout_s=None))
        except RayError as error:
            raise JobError(f"Serve did not start: {_find_reason(str(error))}") from error
        try:
            _deploy(config, build_application(config, base, cpus), resources, stop_event or threading.Event())
            yield f"http://{config.host}:{config.port}"
        finally:
            _drain(config, ray_processes)
    finally:
        # Ray prints an error when Serve's controller exits, although that is part of the shutdown.
        with redirect_stdout(StringIO()):
            # The status of a local Ray is not requested: if Ray has died, the call would hang.
            if get_address(config.address) == LOCAL or not set(serve.status().applications) - {APPLICATION}:
                serve.shutdown()
            if owns_ray:
                ray.shutdown()


def _check_running_server(config: ServeConfig) -> ServeConfig:
    """Check that no other server of the cluster would be replaced or opened.

    Args:
        config: settings of the server.

    Returns:
        The settings, with the key file that the address of a running Serve instance requires.

    Raises:
        UsageError: if the cluster has a server already, or Serve listens on another address.
    """
    if (running := get_proxy_address()) is None:
        return config
    if APPLICATION in serve.status().applications:
        raise UsageError(
            "this cluster has a trimtab server already. Stop it first (in Python: ray.serve.delete('trimtab')), or use another "
            "cluster"
        )
    host, port = running
    if (host, port) != (config.host, config.port):
        raise UsageError(
            f"Serve of this cluster listens on {host}:{port}, not on {config.host}:{config.port}. Set --host {host} and "
            f"--port {port}"
        )
    return replace(config, api_key_file=get_required_key_file(replace(config, host=host)))


def _drain(config: ServeConfig, ray_processes: Iterable[psutil.Process]) -> None:
    """Delete the application once its requests are finished, at the latest after `drain_seconds`.

    The proxies still work meanwhile; Serve's own shutdown stops proxies and replicas at the same time.

    Args:
        config: settings of the server.
        ray_processes: processes of a local Ray; if one has died, nothing is done, because calls of Ray would hang.
    """
    if any(map(_is_dead, ray_processes)):
        return
    serve.delete(APPLICATION, _blocking=False)
    deadline = time.monotonic() + config.drain_seconds + STOP_SECONDS
    while APPLICATION in serve.status().applications and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)


def _list_ray_processes() -> dict[psutil.Process, str]:
    """Return the processes of a local Ray that are not restarted, with their names, which a dead process does not have."""
    return {process: process.name() for process in psutil.Process().children() if process.name() in RAY}


def _is_dead(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _format_models(config: ServeConfig, url: str) -> str:
    return "API key required" if get_required_key_file(config) else f"models: {', '.join(list_models(url))}"


def list_models(url: str) -> list[str]:
    """Return the model names of a server.

    Args:
        url: URL of the server.
    """
    return [entry["id"] for entry in httpx.get(f"{url}/v1/models", timeout=30).json()["data"]]


def _connect(config: ServeConfig) -> bool:
    """Connect to Ray; return True if this call started or joined it."""
    # By default, Ray lowers the priority of its workers; a server must answer quickly.
    os.environ.setdefault("RAY_worker_niceness", "0")
    if config.affinity_header:
        os.environ[settings.BALANCE] = f"hdr({config.affinity_header})"
    patch_haproxy_options(os.environ)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    return connect_to_ray(config.address, _find_proxy_ports() if get_address(config.address) == LOCAL else None)


def _deploy(config: ServeConfig, application: Any, resources: tuple[float, float], stop_event: threading.Event) -> None:
    """Start the replicas of an application with a progress bar; `resources` are their CPU cores and GPUs."""
    errors: list[Exception] = []

    def deploy() -> None:
        try:
            serve.run(application, name=APPLICATION, route_prefix="/")
        except Exception as error:
            errors.append(error)

    # In a thread: `serve.run` blocks until the replicas are ready, and the progress bar must be updated meanwhile.
    thread = threading.Thread(target=deploy, daemon=True)
    thread.start()
    start = time.monotonic()
    with ProgressBar("starting replicas", config.num_replicas) as bar:
        while not stop_event.wait(POLL_SECONDS):
            if errors:
                raise JobError(f"the replicas did not start: {_find_reason(str(errors[0]))}")
            if not thread.is_alive() and _is_healthy(config):
                bar.update(config.num_replicas)
                return
            missing = find_missing_resources(*resources)
            bar.update(0, note=f"| waits for nodes: needs {missing}" if missing else "")
            if time.monotonic() - start > config.startup_timeout_s:
                raise JobError(f"the replicas did not start in {config.startup_timeout_s:.0f} s")


def _is_healthy(config: ServeConfig) -> bool:
    try:
        return httpx.get(f"http://{config.host}:{config.port}/health", timeout=5).status_code == HTTPStatus.OK
    except httpx.HTTPError:
        return False


def _check_port(host: str, port: int) -> None:
    if reason := ports.explain_unavailable_port(host, port):
        raise UsageError(f"cannot listen on {host}:{port}: {reason}. Choose another --port")


def _find_proxy_ports() -> dict[str, str]:
    """Return free ports for HAProxy's own metrics and for the proxy that it falls back to; ports set by the user stay.

    With Serve's fixed ports, servers on one machine would share them, and one could answer the clients of the other.
    """
    free = ports.find_free_ports(len(settings.PROXY_PORTS), "")
    return {key: os.environ.get(key, str(port)) for key, port in zip(settings.PROXY_PORTS, free, strict=True)}


def _find_reason(text: str) -> str:
    """Return the relevant line of a long error: the line of a taken port from HAProxy, else the last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in lines if "cannot bind" in line), lines[-1] if lines else "no reason given")
