"""Servers of bench/serve.py and the models that their loads name."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from peers import servers
from peers.detectors import save_untrained_detector, save_untrained_guard
from peers.servers import Server
from safetensors.torch import save_file

from trimtab.model.base_model import BaseModel

RAY_LLM = Path(__file__).parent / "ray_llm.py"
SERVERS = ("vllm", "ray", "lora", "trimtab", "detector", "guard")
LENGTH, SEQUENCES, SLOTS = 1024, 64, 256
PREFIXES, QUICK_PREFIXES = (1, 64, 256, 1000), (1, 64)
ADAPTERS, RANK = 64, 8
GUARD_LAYER = 18


def build_servers(base: BaseModel, folder: Path, counts: Sequence[int]) -> list[Server]:
    """Build the servers, with their prefixes, detectors and adapters; trimtab has a mode for each number of prefixes."""
    prefixes = servers.save_random_prefixes(base, folder / "prefixes", max([1, *counts]))
    names = [f"{base.name}:{prefix.card.name}" for prefix in prefixes]
    modes = {"trimtab": [base.name]} | {f"trimtab, {count} prefixes": names[:count] for count in counts}
    save_untrained_detector(base, folder / "detector")
    save_untrained_guard(base, folder / "guard", GUARD_LAYER)
    sizes = {"max_model_len": LENGTH, "max_num_seqs": SEQUENCES}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in sizes.items()]
    vllm = servers.build_vllm_command(str(base.path), base.name, *options)
    vllm += [] if torch.cuda.is_available() else ["--block-size", "32"]
    ray_llm = [sys.executable, str(RAY_LLM), "--model", str(base.path), "--name", base.name, "--options", json.dumps(sizes)]
    adapters = save_adapters(base, folder / "adapters")
    lora = ["--enable-lora", "--max-lora-rank", str(RANK), "--max-loras", "8", "--max-cpu-loras", str(ADAPTERS)]
    lora += ["--lora-modules", *(f"{name}={path}" for name, path in adapters.items())]
    engine = [f"--engine.{name}={value}" for name, value in (sizes | {"num_slots": SLOTS}).items()]
    trimtab = servers.build_trimtab_command(base.name, *engine, "--registry")
    policies = json.dumps([{"detector": "guard", "action": "refuse"}])
    return [
        Server("vllm", vllm, {"vllm": [base.name]}, servers.VLLM_ENVIRONMENT),
        Server("ray", ray_llm, {"ray.serve.llm": [base.name]}, servers.VLLM_ENVIRONMENT),
        Server("lora", [*vllm, *lora], {"vllm, 64 LoRA adapters": list(adapters)}, servers.VLLM_ENVIRONMENT),
        Server("trimtab", [*trimtab, str(folder / "prefixes"), "--detect", "false"], modes),
        Server("detector", [*trimtab, str(folder / "detector")], {"trimtab, detector": [base.name]}),
        Server("guard", [*trimtab, str(folder / "guard"), "--policies", policies], {"trimtab, guard": [base.name]}),
    ]


def save_adapters(base: BaseModel, folder: Path) -> dict[str, Path]:
    """Save random LoRA adapters on the query and value projections, in PEFT's format; return their folders by name."""
    shapes = {
        name.removesuffix(".weight"): weight.shape
        for name, weight in base.load("fp32").named_parameters()
        if name.endswith(("q_proj.weight", "v_proj.weight"))
    }
    generator, adapters = torch.Generator().manual_seed(0), dict[str, Path]()
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": ["q_proj", "v_proj"], "bias": "none"}
    config |= {"task_type": "CAUSAL_LM", "base_model_name_or_path": ""}
    for number in range(ADAPTERS):
        path = adapters[f"lora{number}"] = folder / str(number)
        path.mkdir(parents=True)
        tensors: dict[str, torch.Tensor] = {}
        for name, (outputs, inputs) in shapes.items():
            tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(RANK, inputs, generator=generator) * 0.01
            tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(outputs, RANK, generator=generator) * 0.01
        save_file(tensors, path / "adapter_model.safetensors")
        (path / "adapter_config.json").write_text(json.dumps(config))
    return adapters
