"""Tokens a second and latencies of a server: vLLM alone, trimtab with and without prefixes and a detector, vLLM with LoRA.

python bench/serve.py [--quick] [--json FILE]

One machine, the same engine settings, prompts and load for all. Each round starts every server once, one after the other, and
puts every load on it; answers stream and are of one length. The load comes from a process of its own.
"""

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
from safetensors.torch import save_file

from trimtab import base as bases
from trimtab import detector, heads
from trimtab import prefix as prefixes
from trimtab.base import BaseModel
from trimtab.card import Card
from trimtab.data.questions import read_questions
from trimtab.detector import DetectorCard

LOAD = Path(__file__).parent / "peers" / "load.py"
TOKENS, LENGTH, SEQUENCES, RANK = 32, 1024, 64, 8
CONCURRENT = (1, 32, 64)
START_SECONDS = 400.0
LAYERS = (20, 29)
TARGETS = ("q_proj.weight", "v_proj.weight")
# Shares of the peer's tokens a second, and how many milliseconds later the first token may come than vLLM's.
KEPT, ALMOST, LATER = 0.99, 0.95, 10.0


@dataclass(frozen=True)
class Server:
    """A command that serves, the names that it may be asked for, and what is measured on it."""

    name: str
    command: Sequence[str]
    models: Mapping[str, Sequence[str]]
    environment: Mapping[str, str]


def main() -> None:
    options = arguments()
    concurrent = CONCURRENT[:2] if options.quick else CONCURRENT
    found: dict[tuple[str, int], list[dict[str, float]]] = {}
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as name:
        servers = made(bases.resolve(options.base), Path(name), options.quick)
        for number in range(1 if options.quick else options.rounds):
            for server in servers if number % 2 == 0 else reversed(servers):
                if server.name in failed:
                    continue
                try:
                    with running(server) as url:
                        for mode, models in server.models.items():
                            for many in concurrent:
                                found.setdefault((mode, many), []).append(measured(url, models, many, number))
                                print(f"{number + 1} {mode}, {many} at once: {found[mode, many][-1]}", flush=True)
                except RuntimeError as error:
                    failed[server.name] = str(error)
                    print(f"{server.name}: {error}", flush=True)
    lines = report(found, concurrent, failed)
    print(json.dumps(lines, indent=1))
    if options.json:
        Path(options.json).write_text(json.dumps(lines, indent=1) + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round, fewer prefixes and loads")
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args()


def made(base: BaseModel, folder: Path, quick: bool) -> list[Server]:
    """The servers, with 1,000 prefixes, a detector and as many adapters as are compared."""
    many = 64 if quick else 1000
    names = steered(base, folder / "prefixes", many)
    steered(base, folder / "watched", 1)
    watched(base, folder / "watched")
    adapters = adapted(base, folder / "adapters", 64)
    vllm = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(base.path),
        "--served-model-name",
        base.name,
    ]
    vllm += ["--dtype", "float32", "--max-model-len", str(LENGTH), "--max-num-seqs", str(SEQUENCES), "--enforce-eager"]
    vllm += ["--generation-config", "vllm"] + (["--block-size", "32"] if not torch.cuda.is_available() else [])
    lora = ["--enable-lora", "--max-lora-rank", str(RANK), "--max-loras", "8", "--max-cpu-loras", "64", "--lora-modules"]
    lora += [f"{name}={path}" for name, path in adapters.items()]
    ours = [
        sys.executable,
        "-m",
        "trimtab",
        "serve",
        "--model",
        base.name,
        "--engine.precision",
        "fp32",
        "--engine.rows",
        "256",
    ]
    ours += ["--engine.max_length", str(LENGTH), "--engine.max_sequences", str(SEQUENCES)]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}
    counts = {f"trimtab, {count} prefixes": names[:count] for count in (1, 64, many) if count <= many}
    plain = {"trimtab": [base.name]} | counts
    return [
        Server("vllm", vllm, {"vllm": [base.name]}, environment),
        Server("trimtab", [*ours, "--registry", str(folder / "prefixes"), "--detect", "false"], plain, {}),
        Server("detector", [*ours, "--registry", str(folder / "watched")], {"trimtab, detector": [base.name]}, {}),
        Server("lora", [*vllm, *lora], {"vllm, 64 LoRA adapters": list(adapters)}, environment),
    ]


def steered(base: BaseModel, folder: Path, count: int) -> list[str]:
    """So many random prefixes in a folder that serves as registry; gives the models' names."""
    generator = torch.Generator().manual_seed(0)
    for number in range(count):
        card = Card("prefix", f"p{number}", base.name, base.fingerprint, "system", 0, 0, "")
        vectors = torch.randn(1, base.width, generator=generator) * 0.1
        prefixes.save(prefixes.make(vectors, card), folder / f"p{number}" / "1")
        (folder / f"p{number}" / "aliases.json").write_text('{"champion": 1}')
    return [f"{base.name}:p{number}" for number in range(count)]


def watched(base: BaseModel, folder: Path) -> None:
    """A detector of the default settings in the same folder."""
    settings = {"groups": 8}
    card = DetectorCard("truth", base.name, base.fingerprint, list(LAYERS), base.width, "flag", settings, -2.0, {"0.05": 0.5})
    head = heads.get("flag")(base.width, len(LAYERS), **settings)
    spread = torch.stack([torch.zeros(7), torch.ones(7)])
    detector.save(detector.make(head, spread, torch.tensor([0.01, 0.0]), card), folder / "truth" / "1")
    (folder / "truth" / "aliases.json").write_text('{"champion": 1}')


def adapted(base: BaseModel, folder: Path, count: int) -> dict[str, Path]:
    """So many LoRA adapters on the query and value projections, as PEFT saves them."""
    state = dict(base.load("fp32").named_parameters())
    shapes = {
        name.removesuffix(".weight"): w.shape for name, w in state.items() if name.endswith(("q_proj.weight", "v_proj.weight"))
    }
    generator, found = torch.Generator().manual_seed(0), dict[str, Path]()
    for number in range(count):
        path = found[f"lora{number}"] = folder / str(number)
        path.mkdir(parents=True)
        tensors: dict[str, torch.Tensor] = {}
        for name, (out, into) in shapes.items():
            tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(RANK, into, generator=generator) * 0.01
            tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(out, RANK, generator=generator) * 0.01
        save_file(tensors, path / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": ["q_proj", "v_proj"], "bias": "none"}
        (path / "adapter_config.json").write_text(
            json.dumps(config | {"task_type": "CAUSAL_LM", "base_model_name_or_path": ""})
        )
    return found


@contextmanager
def running(server: Server) -> Generator[str]:
    """A server's URL while it is up, warmed by a few requests."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [*server.command, "--host", "127.0.0.1", "--port", str(port)]
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            command, stdout=said, stderr=subprocess.STDOUT, env=os.environ | server.environment, start_new_session=True
        )
        try:
            await_answer(f"http://127.0.0.1:{port}/v1/models", process, said)
            for models in server.models.values():
                measured(f"http://127.0.0.1:{port}", models[:8], 8, -1)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(90)
            except subprocess.TimeoutExpired:
                process.kill()


def await_answer(url: str, process: "subprocess.Popen[bytes]", said: Any) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(url, timeout=5).is_success:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    said.seek(0)
    raise RuntimeError(f"did not start: {said.read().decode(errors='replace').strip().splitlines()[-1][-300:]}")


def measured(url: str, models: Sequence[str], concurrent: int, round_: int) -> dict[str, float]:
    """One load in a process of its own."""
    texts = [question.question for question in read_questions("trimtab:countries")]
    task = {"url": url, "models": list(models), "texts": texts, "tokens": TOKENS, "seed": round_}
    task |= {"concurrent": concurrent, "requests": max(8, 2 * concurrent)}
    command = [sys.executable, str(LOAD), json.dumps(task)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the load failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout)


def report(
    found: dict[tuple[str, int], list[dict[str, float]]], concurrent: Sequence[int], failed: dict[str, str]
) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for (mode, many), rounds in found.items():
        peer, goal = ("vllm", ALMOST) if mode == "trimtab" else ("trimtab", KEPT)
        against = [] if mode.startswith("vllm") else found.get((peer, many), [])
        lines.append(line(f"serve.{mode}.{many}", "tokens_per_second", "tokens/s", rounds, peer, against, goal))
        lines += [line(f"serve.{mode}.{many}.{key}", key, "ms", rounds, peer, against, None) for key in ("ttft_ms", "itl_ms")]
    for many in concurrent:
        if ours := found.get(("trimtab", many)):
            later = middle(ours, "ttft_ms") - middle(found["vllm", many], "ttft_ms")
            lines.append(
                {"name": f"serve.first_token_later.{many}", "value": later, "unit": "ms", "peer": "vllm", "ratio": None}
                | {"goal": LATER, "met": later <= LATER}
            )
    return lines + [{"name": f"serve.{name}", "value": None, "unit": why, "peer": None} for name, why in failed.items()]


def line(
    name: str,
    key: str,
    unit: str,
    rounds: Sequence[dict[str, float]],
    peer: str,
    against: Sequence[dict[str, float]],
    goal: float | None,
) -> dict[str, Any]:
    value, values = middle(rounds, key), [one[key] for one in rounds]
    ratio = value / middle(against, key) if against else None
    return {
        "name": name,
        "value": value,
        "unit": unit,
        "spread": [min(values), max(values)],
        "peer": {peer: middle(against, key)} if against else None,
        "ratio": ratio,
        "goal": goal if against else None,
        "met": ratio >= goal if ratio is not None and goal is not None else None,
    }


def middle(rounds: Sequence[dict[str, float]], key: str) -> float:
    return statistics.median(one[key] for one in rounds)


if __name__ == "__main__":
    main()
