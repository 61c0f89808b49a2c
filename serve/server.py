"""`trimtab serve`: Ray Serve up, ready, and down again.

trimtab serve --model smollm2-135m --port 8000
curl localhost:8000/v1/models
"""

import logging
import os
import signal
import threading
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from http import HTTPStatus
from io import StringIO
from types import FrameType
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
from trimtab.serve.app import build_application
from trimtab.serve.config import ServeConfig
from trimtab.serve.registry.sources import open_sources
from trimtab.util import ports

APPLICATION = "trimtab"
# Processes of Ray that nothing starts again.
RAY = ("gcs_server", "raylet")
POLL_SECONDS = 0.5


def run_serve(config: ServeConfig) -> None:
    """Serve until SIGINT or SIGTERM."""
    ended = threading.Event()

    def end(number: int, frame: FrameType | None) -> None:
        ended.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    with serving(config, ended) as url:
        if ended.is_set():
            return
        print_line(f"ready: {url}/v1   page: {url}/   {_format_models(config, url)}")
        print_line("press Ctrl-C to stop")
        own = {process: process.name() for process in psutil.Process().children() if process.name() in RAY}
        while not ended.wait(POLL_SECONDS):
            _check_ray(own)
        print_line("stopping")


@contextmanager
def serving(config: ServeConfig, ended: threading.Event | None = None) -> Generator[str]:
    """The server's URL once it answers; down again at the end. `ended` gives up waiting for it.

    Raises UsageError for a port that is taken, JobError where replicas do not come up.
    """
    print_line(f"base model {config.model} (the first time it is downloaded)")
    base = resolve_base_model(config.model, config.revision)
    args.check_engine_config(base, config.engine)
    open_sources(base, config.registry)
    config = replace(config, key_file=get_required_key_file(config))
    _check_port(config.host, config.port)
    ours = _connect(config)
    try:
        cpus = config.cpus or get_max_node_cores() / max(config.replicas, config.most_replicas)
        taken = config.replicas * cpus, config.replicas * config.gpus
        check_resources("serving", *taken)
        try:
            serve.start(http_options=HTTPOptions(host=config.host, port=config.port, request_timeout_s=None))
        except RayError as error:
            raise JobError(f"Serve did not start: {_find_reason(str(error))}") from error
        _deploy(config, build_application(config, base, cpus), taken, ended or threading.Event())
        yield f"http://{config.host}:{config.port}"
    finally:
        # Ray tells us here, as if something were wrong, that Serve's controller is gone, which ends itself when it is told to.
        with redirect_stdout(StringIO()):
            _shut_down(config)
            if ours:
                ray.shutdown()


def _shut_down(config: ServeConfig) -> None:
    """Stop what was deployed; Serve as well, unless others have something on it."""
    # A Ray of our own is not asked: where it has died, it would not answer.
    if get_address(config.address) != LOCAL and set(serve.status().applications) - {APPLICATION}:
        serve.delete(APPLICATION)
    else:
        serve.shutdown()


def _check_ray(own: Mapping[psutil.Process, str]) -> None:
    """Raise JobError where a process of a local Ray has died: nothing would be answered, and nobody told."""
    for process, name in own.items():
        if _is_dead(process):
            raise JobError(f"Ray's {name} has died, and the server with it: start it again")


def _is_dead(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _format_models(config: ServeConfig, url: str) -> str:
    return "an API key is asked for" if get_required_key_file(config) else f"models: {', '.join(list_models(url))}"


def list_models(url: str) -> list[str]:
    """Names that can be asked for."""
    return [entry["id"] for entry in httpx.get(f"{url}/v1/models", timeout=30).json()["data"]]


def _connect(config: ServeConfig) -> bool:
    """Connect to Ray; True where this started or joined it."""
    # Ray gives its workers less of a busy machine than others get; people wait for these.
    os.environ.setdefault("RAY_worker_niceness", "0")
    if config.affinity:
        os.environ[settings.BALANCE] = f"hdr({config.affinity})"
    patch_haproxy_options(os.environ)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    return connect_to_ray(config.address, _proxy_ports() if get_address(config.address) == LOCAL else None)


def _deploy(config: ServeConfig, made: Any, taken: tuple[float, float], ended: threading.Event) -> None:
    """Start the replicas of an application, which take so many CPU cores and GPUs, behind a bar."""
    failure: list[Exception] = []

    def deploy() -> None:
        try:
            serve.run(made, name=APPLICATION, route_prefix="/")
        except Exception as error:
            failure.append(error)

    # In a thread: `serve.run` waits for the replicas without a word, and people want to see that something happens.
    thread = threading.Thread(target=deploy, daemon=True)
    thread.start()
    began = time.monotonic()
    with ProgressBar("starting replicas", config.replicas) as bar:
        while not ended.wait(POLL_SECONDS):
            if failure:
                raise JobError(f"the replicas did not start: {_find_reason(str(failure[0]))}")
            if not thread.is_alive() and _is_healthy(config):
                bar.update(config.replicas)
                return
            short = find_missing_resources(*taken)
            bar.update(0, note=f"| waits for nodes: it takes {short}" if short else "")
            if time.monotonic() - began > config.start_seconds:
                raise JobError(f"the replicas did not start in {config.start_seconds:.0f} s")


def _is_healthy(config: ServeConfig) -> bool:
    try:
        return httpx.get(f"http://{config.host}:{config.port}/health", timeout=5).status_code == HTTPStatus.OK
    except httpx.HTTPError:
        return False


def _check_port(host: str, port: int) -> None:
    if why := ports.explain_unavailable_port(host, port):
        raise UsageError(f"cannot listen on {host}:{port} ({why}); choose another --port")


def _proxy_ports() -> dict[str, str]:
    """Free ones for what HAProxy says of itself, so that servers share a machine; those that the user has set stay."""
    return {
        key: os.environ.get(key, str(port))
        for key, port in zip(settings.PROXY_PORTS, ports.find_free_ports(2, ""), strict=True)
    }


def _find_reason(text: str) -> str:
    """The line that matters of a long report: HAProxy names a taken port before it says that it gives up."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in lines if "cannot bind" in line), lines[-1] if lines else "no reason given")
