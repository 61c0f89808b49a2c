"""Servers of the benchmarks: their commands, start and stop, and the prefixes that they serve."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch

from trimtab.artifacts.card import PrefixCard
from trimtab.artifacts.prefix import Prefix, build_prefix, save_prefix
from trimtab.model.base_model import BaseModel
from trimtab.util import ports

START_SECONDS, STOP_SECONDS = 400.0, 90.0
# vLLM's CPU build reads these from the environment only.
VLLM_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}


@dataclass(frozen=True)
class Server:
    """Server that a benchmark starts.

    Attributes:
        name: name of the server in the report.
        command: command without the address.
        models: names of the models of each mode, by mode.
        environment: additional environment variables.
    """

    name: str
    command: Sequence[str]
    models: Mapping[str, Sequence[str]] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RunningServer:
    """Server that answers requests.

    Attributes:
        url: URL of the server.
        process: process of its command.
    """

    url: str
    process: "subprocess.Popen[bytes]"


def build_vllm_command(model: str, name: str, *options: str) -> list[str]:
    """Build the command of vLLM's own server."""
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--served-model-name", name]
    return [*command, "--dtype", "float32", "--enforce-eager", "--generation-config", "vllm", *options]


def build_trimtab_command(name: str, *options: str) -> list[str]:
    """Build the command of a server of trimtab."""
    return [sys.executable, "-m", "trimtab", "serve", "--base", name, "--engine.dtype", "fp32", *options]


@contextmanager
def run_server(server: Server, headers: Mapping[str, str] | None = None) -> Generator[RunningServer]:
    """Run a server while the context is open.

    Args:
        server: the server.
        headers: headers of the requests that test whether it is ready.

    Raises:
        RuntimeError: with its last output, if it does not start.
    """
    port = ports.find_free_ports()[0]
    command = [*server.command, "--host", "127.0.0.1", "--port", str(port)]
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=os.environ | server.environment, start_new_session=True
        )
        try:
            wait_until_ready(f"http://127.0.0.1:{port}/v1/models", process, output, headers)
            yield RunningServer(f"http://127.0.0.1:{port}", process)
        finally:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()


def wait_until_ready(
    url: str, process: "subprocess.Popen[bytes]", output: Any, headers: Mapping[str, str] | None = None
) -> None:
    """Wait until a URL answers; raise RuntimeError with the last output of the process if it ends or takes too long."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(url, timeout=5, headers=headers).is_success:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    output.seek(0)
    lines = output.read().decode(errors="replace").strip().splitlines() or ["no output"]
    raise RuntimeError(f"did not start: {lines[-1][-300:]}")


def save_random_prefixes(base: BaseModel, folder: Path, count: int, *, strength: float = 0.1) -> list[Prefix]:
    """Save prefixes p0, p1, ... of one random row each in a folder that serves as registry.

    Args:
        base: base model.
        folder: the folder.
        count: number of prefixes.
        strength: standard deviation of the noise; above 1, the factor of a random row of the vocabulary, which changes answers.
    """
    generator = torch.Generator().manual_seed(0)
    prefixes: list[Prefix] = []
    table = base.load("fp32").get_input_embeddings().weight.detach() if strength > 1 else None
    for number in range(count):
        card = PrefixCard("prefix", f"p{number}", base.name, base.fingerprint, "system", 0, 0, "")
        noise = torch.randn(1, base.width, generator=generator)
        row = 0 if table is None else table[torch.randint(len(table), (1,), generator=generator)] * strength
        prefix = build_prefix(row + noise * (0.05 if strength > 1 else strength), card)
        save_prefix(prefix, folder / f"p{number}" / "1")
        (folder / f"p{number}" / "aliases.json").write_text('{"champion": 1}')
        prefixes.append(prefix)
    return prefixes
