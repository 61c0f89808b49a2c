"""Servers as benchmarks start them: a command, until it answers, and down again; and the prefixes that they are given."""

import os
import signal
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
    """A command that serves, but for its address; `models` are the names that each of its loads asks for."""

    name: str
    command: Sequence[str]
    models: Mapping[str, Sequence[str]] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Up:
    """A server that answers."""

    url: str
    process: "subprocess.Popen[bytes]"


def vllm(model: str, name: str, *options: str) -> list[str]:
    """The command of vLLM's own server."""
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--served-model-name", name]
    return [*command, "--dtype", "float32", "--enforce-eager", "--generation-config", "vllm", *options]


def trimtab(name: str, *options: str) -> list[str]:
    """The command of trimtab's."""
    return [sys.executable, "-m", "trimtab", "serve", "--base", name, "--engine.dtype", "fp32", *options]


@contextmanager
def running(server: Server, headers: Mapping[str, str] | None = None) -> Generator[Up]:
    """A server while it is up, tried with `headers`. Raises RuntimeError with its last output if it does not start."""
    port = ports.find_free_ports()[0]
    command = [*server.command, "--host", "127.0.0.1", "--port", str(port)]
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=os.environ | server.environment, start_new_session=True
        )
        try:
            await_answer(f"http://127.0.0.1:{port}/v1/models", process, output, headers)
            yield Up(f"http://127.0.0.1:{port}", process)
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()


def await_answer(url: str, process: "subprocess.Popen[bytes]", output: Any, headers: Mapping[str, str] | None = None) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(url, timeout=5, headers=headers).is_success:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    output.seek(0)
    words = output.read().decode(errors="replace").strip().splitlines() or ["no word"]
    raise RuntimeError(f"did not start: {words[-1][-300:]}")


def random_prefixes(base: BaseModel, folder: Path, count: int, *, strength: float = 0.1) -> list[Prefix]:
    """So many prefixes in a folder that serves as registry, p0, p1, ...: noise, or rows of the vocabulary where `strength` is
    above 1, which change answers."""
    generator, made = torch.Generator().manual_seed(0), list[Prefix]()
    table = base.load("fp32").get_input_embeddings().weight.detach() if strength > 1 else None
    for number in range(count):
        card = PrefixCard("prefix", f"p{number}", base.name, base.fingerprint, "system", 0, 0, "")
        noise = torch.randn(1, base.width, generator=generator)
        picked = 0 if table is None else table[torch.randint(len(table), (1,), generator=generator)] * strength
        prefix = build_prefix(picked + noise * (0.05 if strength > 1 else strength), card)
        save_prefix(prefix, folder / f"p{number}" / "1")
        (folder / f"p{number}" / "aliases.json").write_text('{"champion": 1}')
        made.append(prefix)
    return made
