"""Seconds and memory of a training step: trimtab against PEFT prompt tuning with the Hugging Face Trainer.

python bench/align.py [--quick] [--json FILE]              # the default model on this machine
python bench/align.py --shape 7b --device cuda --json F    # random weights in the shape of a larger model

The same model, rows, type and first vector (one, before the prompt) for both; each measurement is a process of its own, and the
two take turns. Needs torch, transformers and peft alone beside trimtab's core.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from trimtab.model.frozen_model import FrozenModel, TokenizedSample, TrainingExample, split_into_micro_batches
from trimtab.model.objective_inputs import ObjectiveScorer, compute_totals
from trimtab.model.prefix_tree import build_prefix_tree
from trimtab.model.reference_outputs import ReferenceOutputs
from trimtab.objectives.likelihood import Likelihood

Rows = list[tuple[list[int], list[int]]]
"""Prompts and answers as token ids."""

BATCH, TARGETS, RATE = 16, 8, 0.01
ANSWER = "Here is what you can do about that, step by step and with care."
SHAPES = {
    # hidden, layers, heads, key-value heads, intermediate, vocabulary
    "1b": (2048, 16, 32, 8, 8192, 128_256),
    "7b": (4096, 32, 32, 32, 11_008, 32_000),
    "13b": (5120, 40, 40, 40, 13_824, 32_000),
}


def main() -> None:
    options = arguments()
    if options.worker:
        print(json.dumps(WORKERS[options.worker](options)))
        return
    pairs = 2 if options.quick else options.pairs
    results: dict[str, list[dict[str, float]]] = {"trimtab": [], "peft": []}
    for number in range(pairs):
        # In turns, and each first as often as second, so that neither has the cooler machine.
        for name in sorted(results, reverse=bool(number % 2)):
            results[name].append(measure(name))
            print(f"{number + 1}/{pairs} {name}: {results[name][-1]}", flush=True)
    lines = report(results, options)
    print(json.dumps(lines, indent=1))
    if options.json:
        Path(options.json).write_text(json.dumps(lines, indent=1) + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two pairs of few steps")
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--pairs", type=int, default=5, help="measurements of each")
    parser.add_argument("--steps", type=int, default=0, help="steps in a measurement; 0 chooses")
    parser.add_argument("--shape", choices=["default", *SHAPES], default="default")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=["auto", "bf16", "fp32"], default="auto", help="type of the default model")
    parser.add_argument("--micro-batch", type=int, default=0, help="rows that trimtab computes at once; 0 chooses")
    parser.add_argument("--worker", choices=WORKERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.steps = options.steps or (3 if options.quick else 8)
    options.micro_batch = options.micro_batch or BATCH
    return options


def measure(name: str) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, __file__, *sys.argv[1:], "--worker", name], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def load(options: argparse.Namespace) -> tuple[Any, Rows]:
    """The frozen model, and rows of token ids: prompt and answer."""
    if options.shape == "default":
        from trimtab.model.base_model import resolve_base_model

        base = resolve_base_model("smollm2-135m")
        tokenizer, model = base.tokenizer(), base.load(options.precision, options.device)
        lines = (files("trimtab.data") / "prompts" / "contrast.jsonl").read_text().splitlines()[: BATCH * (options.steps + 1)]
        answer = tokenizer.encode(ANSWER)[:TARGETS]
        prompts: Any = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": json.loads(line)["prompt"]}], add_generation_prompt=True, return_dict=False
            )
            for line in lines
        ]
        return model, [(list(p), answer) for p in prompts]
    hidden, layers, heads, groups, inner, vocabulary = SHAPES[options.shape]
    config = LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        intermediate_size=inner,
        vocab_size=vocabulary,
    )
    torch.manual_seed(0)
    with torch.device(options.device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    model.requires_grad_(False)
    lengths = [96 + (37 * i) % 64 for i in range(BATCH * (options.steps + 1))]
    return model, [
        (torch.randint(3, vocabulary, (n,)).tolist(), torch.randint(3, vocabulary, (TARGETS,)).tolist()) for n in lengths
    ]


def run_trimtab(options: argparse.Namespace) -> dict[str, float]:
    model, rows = load(options)
    row = model.get_input_embeddings().num_embeddings
    frozen = FrozenModel(model, row)
    frozen.enable_prefix_tree()
    scorer = ObjectiveScorer(ReferenceOutputs(frozen), Likelihood())
    examples = [TrainingExample(TokenizedSample((row, *p, *a), (*p, *a), len(a)), "harmful") for p, a in rows]
    vectors = first_vector(model)
    parameter = vectors.clone().requires_grad_()
    optimiser = torch.optim.AdamW([parameter], lr=RATE, weight_decay=0.0)
    losses: list[float] = []

    def step(number: int) -> None:
        batch = examples[number * BATCH : (number + 1) * BATCH]
        parts = split_into_micro_batches(batch, options.micro_batch)
        results = [scorer.compute(parameter.detach(), part, compute_totals(batch), torch.empty(0)) for part in parts]
        parameter.grad = sum((r.gradient for r in results), torch.zeros(()))
        optimiser.step()
        losses.append(sum(r.loss for r in results))

    used = [examples[at : at + options.micro_batch] for at in range(BATCH, len(examples), options.micro_batch)]
    computed = sum(len(build_prefix_tree([e.chosen.ids for e in part], frozen.device).ids) for part in used)
    return timed(step, options, model, computed / options.steps) | {"first_loss": losses[0], "last_loss": losses[-1]}


def run_peft(options: argparse.Namespace) -> dict[str, float]:
    from peft import PromptTuningConfig, TaskType, get_peft_model
    from transformers import Trainer, TrainerCallback, TrainingArguments

    model, rows = load(options)
    tuned: Any = get_peft_model(model, PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=1))
    tuned.prompt_encoder["default"].embedding.weight.data.copy_(first_vector(model))
    data: Any = [{"input_ids": [*p, *a], "labels": [*[-100] * len(p), *a]} for p, a in rows]

    def collate(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        longest = max(len(r["input_ids"]) for r in batch)
        padded = {
            "input_ids": [r["input_ids"] + [0] * (longest - len(r["input_ids"])) for r in batch],
            "labels": [r["labels"] + [-100] * (longest - len(r["labels"])) for r in batch],
            "attention_mask": [[1] * len(r["input_ids"]) + [0] * (longest - len(r["input_ids"])) for r in batch],
        }
        return {key: torch.tensor(value) for key, value in padded.items()}

    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            synchronise(options)
            times.append(-time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            synchronise(options)
            times[-1] += time.perf_counter()

    settings = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=BATCH,
        max_steps=options.steps + 1,
        learning_rate=RATE,
        weight_decay=0.0,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=options.device == "cpu",
        train_sampling_strategy="sequential",
        disable_tqdm=True,
    )
    loaded = resident(options)
    trainer = Trainer(tuned, settings, train_dataset=data, data_collator=collate, callbacks=[Clock()])
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    computed = sum(len(p) + len(a) + 1 for p, a in rows[BATCH : BATCH * (options.steps + 1)]) / options.steps
    return figures(times[1:], loaded, options, model, computed) | {"first_loss": losses[0], "last_loss": losses[-1]}


def timed(step: Callable[[int], None], options: argparse.Namespace, model: Any, computed: float) -> dict[str, float]:
    loaded = resident(options)
    times: list[float] = []
    for number in range(options.steps + 1):
        began = time.perf_counter()
        step(number)
        synchronise(options)
        times.append(time.perf_counter() - began)
    return figures(times[1:], loaded, options, model, computed)


def figures(times: list[float], loaded: float, options: argparse.Namespace, model: Any, tokens: float) -> dict[str, float]:
    """Median seconds of a step after the first, peak memory, the tokens of a step that go through the model without padding,
    and the share of the machine's matrix speed that is reached on them."""
    body = sum(p.numel() for p in model.get_decoder().layers.parameters())
    head = model.get_output_embeddings().weight.numel() * TARGETS * BATCH / tokens
    # Two for the forward pass and two for the gradient of the inputs: the weights are frozen and have none.
    needed = 4 * tokens * (body + head)
    seconds = statistics.median(times)
    return {
        "seconds": seconds,
        "peak_gib": peak(options),
        "above_model_gib": peak(options) - loaded,
        "tokens": tokens,
        "share_of_peak": needed / seconds / matrix_speed(options, model.dtype),
    }


def first_vector(model: Any) -> torch.Tensor:
    return model.get_input_embeddings().weight[100:101].detach().float().cpu().clone()


def synchronise(options: argparse.Namespace) -> None:
    if options.device != "cpu":
        torch.cuda.synchronize()


def peak(options: argparse.Namespace) -> float:
    if options.device != "cpu":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def resident(options: argparse.Namespace) -> float:
    """Memory in use now, in GiB."""
    if options.device != "cpu":
        return torch.cuda.memory_allocated() / 2**30
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**30


def matrix_speed(options: argparse.Namespace, kind: torch.dtype) -> float:
    """FLOP/s of a large matrix product in the model's type, the best of five."""
    size = 1536 if options.device == "cpu" else 8192
    a = torch.randn(size, size, device=options.device, dtype=kind)
    best = float("inf")
    for _ in range(5):
        synchronise(options)
        began = time.perf_counter()
        _ = a @ a
        synchronise(options)
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def report(results: dict[str, list[dict[str, float]]], options: argparse.Namespace) -> list[dict[str, object]]:
    """Medians with spread, and the ratio of each pair."""
    goals = {"seconds": 2.0, "peak_gib": 0.6, "share_of_peak": None if options.device == "cpu" else 0.5}
    lines: list[dict[str, object]] = []
    for key, unit in (
        ("seconds", "s/step"),
        ("peak_gib", "GiB"),
        ("above_model_gib", "GiB"),
        ("tokens", "tokens/step"),
        ("share_of_peak", "share"),
    ):
        ours, theirs = ([r[key] for r in results[name]] for name in ("trimtab", "peft"))
        ratios = [t / o if key == "seconds" else o / t for o, t in zip(ours, theirs, strict=True)]
        ratio, goal = statistics.median(ratios), goals.get(key)
        value = statistics.median(ours)
        reached = value if key == "share_of_peak" else ratio
        met = None if goal is None else (reached <= goal if key == "peak_gib" else reached >= goal)
        lines.append(
            {
                "name": f"align.{options.shape}.{key}",
                "value": value,
                "unit": unit,
                "spread": [min(ours), max(ours)],
                "peer": {"peft prompt tuning, Trainer": statistics.median(theirs), "spread": [min(theirs), max(theirs)]},
                "ratio": ratio,
                "ratio_spread": [min(ratios), max(ratios)],
                "goal": goal,
                "met": met,
            }
        )
    gap = max(abs(o["first_loss"] - t["first_loss"]) for o, t in zip(results["trimtab"], results["peft"], strict=True))
    lines.append({"name": f"align.{options.shape}.first_loss_gap", "value": gap, "unit": "nats", "peer": None})
    lines[-1] |= {"ratio": None, "goal": 0.01, "met": gap <= 0.01}
    return lines


WORKERS = {"trimtab": run_trimtab, "peft": run_peft}

if __name__ == "__main__":
    main()
