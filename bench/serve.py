"""Tokens a second and latencies of a server: vLLM alone, trimtab with and without prefixes and a detector, vLLM with LoRA.

python bench/serve.py [--quick] [--only vllm trimtab detector lora] [--json FILE]

One machine, the same engine settings, prompts and load for all. Each round starts every server once, one after the other, and
puts every load on it; answers stream and are of one length. The load comes from a process of its own.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peers import servers
from peers.detectors import save_untrained_detector
from peers.servers import Server
from safetensors.torch import save_file

from trimtab.data.questions import read_questions
from trimtab.model.base_model import BaseModel, resolve_base_model

LOAD = Path(__file__).parent / "peers" / "load.py"
TOKENS, LENGTH, SEQUENCES, RANK = 32, 1024, 64, 8
CONCURRENT = (1, 32, 64)
WARM = 32
SERVERS = ("vllm", "trimtab", "detector", "lora")
# Shares of the peer's tokens a second, and how many milliseconds later the first token may come than vLLM's.
KEPT, ALMOST, LATER = 0.99, 0.95, 10.0


def main() -> None:
    options = arguments()
    concurrent = CONCURRENT[:2] if options.quick else CONCURRENT
    found: dict[tuple[str, int], list[dict[str, float]]] = {}
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as name:
        every = made(resolve_base_model(options.base), Path(name), options.quick)
        peers = [server for server in every if server.name in options.only]
        for number in range(1 if options.quick else options.rounds):
            for server in peers if number % 2 == 0 else reversed(peers):
                if server.name in failed:
                    continue
                try:
                    with servers.running(server) as up:
                        for models in server.models.values():
                            # The first requests of all warm up.
                            measured(up.url, models[:8], WARM, -1)
                        # In turns, so that no mode is always the first one after a start.
                        modes = list(server.models.items())
                        for mode, models in modes if number % 2 == 0 else reversed(modes):
                            for many in concurrent:
                                found.setdefault((mode, many), []).append(measured(up.url, models, many, number))
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
    parser.add_argument("--only", nargs="+", choices=SERVERS, default=SERVERS, help="servers to start")
    return parser.parse_args()


def made(base: BaseModel, folder: Path, quick: bool) -> list[Server]:
    """The servers, with 1,000 prefixes, a detector and as many adapters as are compared."""
    many = 64 if quick else 1000
    names = [f"{base.name}:{prefix.card.name}" for prefix in servers.random_prefixes(base, folder / "prefixes", many)]
    servers.random_prefixes(base, folder / "watched", 1)
    save_untrained_detector(base, folder / "watched")
    adapters = adapted(base, folder / "adapters", 64)
    vllm = servers.vllm(str(base.path), base.name, "--max-model-len", str(LENGTH), "--max-num-seqs", str(SEQUENCES))
    vllm += [] if torch.cuda.is_available() else ["--block-size", "32"]
    lora = ["--enable-lora", "--max-lora-rank", str(RANK), "--max-loras", "8", "--max-cpu-loras", "64", "--lora-modules"]
    lora += [f"{name}={path}" for name, path in adapters.items()]
    sizes = ["--engine.num_slots", "256", "--engine.max_model_len", str(LENGTH), "--engine.max_num_seqs", str(SEQUENCES)]
    ours = servers.trimtab(base.name, *sizes, "--registry")
    counts = {f"trimtab, {count} prefixes": names[:count] for count in (1, 64, many) if count <= many}
    plain = {"trimtab": [base.name]} | counts
    return [
        Server("vllm", vllm, {"vllm": [base.name]}, servers.VLLM_ENVIRONMENT),
        Server("trimtab", [*ours, str(folder / "prefixes"), "--detect", "false"], plain),
        Server("detector", [*ours, str(folder / "watched")], {"trimtab, detector": [base.name]}),
        Server("lora", [*vllm, *lora], {"vllm, 64 LoRA adapters": list(adapters)}, servers.VLLM_ENVIRONMENT),
    ]


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


def measured(url: str, models: Sequence[str], concurrent: int, round_: int) -> dict[str, float]:
    """One load in a process of its own."""
    texts = [question.question for question in read_questions("trimtab:countries")]
    task = {"url": url, "models": list(models), "texts": texts, "tokens": TOKENS, "seed": 1000 * round_ + concurrent}
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
        if (ours := found.get(("trimtab", many))) and (theirs := found.get(("vllm", many))):
            later = middle(ours, "ttft_ms") - middle(theirs, "ttft_ms")
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
