"""Time and memory of a training step: trimtab, and prompt tuning of PEFT with the Hugging Face Trainer.

python bench/align.py [--quick] [--json FILE]                 # the default model on this machine
python bench/align.py --shape 7b --device cuda --json FILE    # random weights in the shape of a larger model

Both train one vector before the prompt, with the same model, rows, precision and initial vector. Each measurement runs in a
process of its own, and the two take turns. Beside the core of trimtab, only torch, transformers and peft are required.
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
"""Prompt and answer of each row as token ids."""

BATCH, ANSWER_TOKENS, LEARNING_RATE = 16, 8, 0.01
STEPS, QUICK_STEPS, QUICK_PAIRS = 8, 3, 2
ANSWER = "Here is what you can do about that, step by step and with care."
SHAPES = {
    # hidden, layers, heads, key-value heads, intermediate, vocabulary
    "1b": (2048, 16, 32, 8, 8192, 128_256),
    "7b": (4096, 32, 32, 32, 11_008, 32_000),
    "13b": (5120, 40, 40, 40, 13_824, 32_000),
}
# Goals: ratio of seconds, ratio of peak memory, share of the matrix speed on a GPU, and difference of the first losses in nats.
MIN_SPEED_RATIO, MAX_MEMORY_RATIO, MIN_GPU_SHARE, MAX_LOSS_GAP = 2.0, 0.6, 0.5, 0.01
CPU_MATRIX_SIZE, GPU_MATRIX_SIZE, MATRIX_PRODUCTS = 1536, 8192, 5


def main() -> None:
    options = parse_arguments()
    if options.worker:
        print(json.dumps(WORKERS[options.worker](options)))
        return
    pairs = QUICK_PAIRS if options.quick else options.pairs
    results: dict[str, list[dict[str, float]]] = {"trimtab": [], "peft": []}
    for number in range(pairs):
        # The order alternates, so that neither always runs on the cooler machine.
        for name in sorted(results, reverse=bool(number % 2)):
            results[name].append(run_measurement(name))
            print(f"{number + 1}/{pairs} {name}: {results[name][-1]}", flush=True)
    lines = build_report(results, options)
    print(json.dumps(lines, indent=1))
    if options.json:
        Path(options.json).write_text(json.dumps(lines, indent=1) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two pairs of few steps")
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--pairs", type=int, default=5, help="measurements of each")
    parser.add_argument("--steps", type=int, default=0, help="steps in a measurement; 0 selects a default")
    parser.add_argument("--shape", choices=["default", *SHAPES], default="default")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=["auto", "bf16", "fp32"], default="auto", help="precision of the default model")
    parser.add_argument(
        "--micro-batch", type=int, default=0, help="rows that trimtab computes at once; 0 selects all rows of a step"
    )
    parser.add_argument("--worker", choices=WORKERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.steps = options.steps or (QUICK_STEPS if options.quick else STEPS)
    options.micro_batch = options.micro_batch or BATCH
    return options


def run_measurement(name: str) -> dict[str, float]:
    """Run a measurement in a process of its own, with the options of this command."""
    command = [sys.executable, __file__, *sys.argv[1:], "--worker", name]
    completed = subprocess.run(command, capture_output=True, text=True, check=False)
    if completed.returncode:
        raise SystemExit(f"{name} failed:\n{completed.stderr[-2000:]}")
    return json.loads(completed.stdout.splitlines()[-1])


def load_model_and_rows(options: argparse.Namespace) -> tuple[Any, Rows]:
    """Load the default model with rows of the project, or build a random model with random rows."""
    if options.shape == "default":
        # Random models do not need the registry of base models.
        from trimtab.model.base_model import resolve_base_model

        base = resolve_base_model("smollm2-135m")
        tokenizer, model = base.tokenizer(), base.load(options.precision, options.device)
        lines = (files("trimtab.data") / "prompts" / "contrast.jsonl").read_text().splitlines()[: BATCH * (options.steps + 1)]
        answer = tokenizer.encode(ANSWER)[:ANSWER_TOKENS]
        prompts: Any = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": json.loads(line)["prompt"]}], add_generation_prompt=True, return_dict=False
            )
            for line in lines
        ]
        return model, [(list(prompt), answer) for prompt in prompts]
    hidden, layers, heads, key_value_heads, intermediate, vocabulary = SHAPES[options.shape]
    config = LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        intermediate_size=intermediate,
        vocab_size=vocabulary,
    )
    torch.manual_seed(0)
    with torch.device(options.device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    model.requires_grad_(False)
    lengths = [96 + (37 * index) % 64 for index in range(BATCH * (options.steps + 1))]
    return model, [
        (torch.randint(3, vocabulary, (length,)).tolist(), torch.randint(3, vocabulary, (ANSWER_TOKENS,)).tolist())
        for length in lengths
    ]


def run_trimtab(options: argparse.Namespace) -> dict[str, float]:
    """Measure the training step of trimtab."""
    model, rows = load_model_and_rows(options)
    slot_token = model.get_input_embeddings().num_embeddings
    frozen = FrozenModel(model, slot_token)
    frozen.enable_prefix_tree()
    scorer = ObjectiveScorer(ReferenceOutputs(frozen), Likelihood())
    examples = [
        TrainingExample(TokenizedSample((slot_token, *prompt, *answer), (*prompt, *answer), len(answer)), "harmful")
        for prompt, answer in rows
    ]
    parameter = build_initial_vector(model).requires_grad_()
    optimizer = torch.optim.AdamW([parameter], lr=LEARNING_RATE, weight_decay=0.0)
    losses: list[float] = []

    def run_step(number: int) -> None:
        batch = examples[number * BATCH : (number + 1) * BATCH]
        parts = split_into_micro_batches(batch, options.micro_batch)
        results = [scorer.compute(parameter.detach(), part, compute_totals(batch), torch.empty(0)) for part in parts]
        parameter.grad = sum((result.gradient for result in results), torch.zeros(()))
        optimizer.step()
        losses.append(sum(result.loss for result in results))

    starts = range(BATCH, len(examples), options.micro_batch)
    parts = [examples[start : start + options.micro_batch] for start in starts]
    tokens = sum(len(build_prefix_tree([example.chosen.ids for example in part], frozen.device).ids) for part in parts)
    figures = measure_steps(run_step, options, model, tokens / options.steps)
    return figures | {"first_loss": losses[0], "last_loss": losses[-1]}


def run_peft(options: argparse.Namespace) -> dict[str, float]:
    """Measure the training step of PEFT with the Trainer."""
    # PEFT and the Trainer are needed for this measurement only.
    from peft import PromptTuningConfig, TaskType, get_peft_model
    from transformers import Trainer, TrainerCallback, TrainingArguments

    model, rows = load_model_and_rows(options)
    tuned: Any = get_peft_model(model, PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=1))
    tuned.prompt_encoder["default"].embedding.weight.data.copy_(build_initial_vector(model))
    data: Any = [{"input_ids": [*prompt, *answer], "labels": [*[-100] * len(prompt), *answer]} for prompt, answer in rows]

    def collate(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in batch)
        padded = {
            "input_ids": [row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in batch],
            "labels": [row["labels"] + [-100] * (longest - len(row["labels"])) for row in batch],
            "attention_mask": [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in batch],
        }
        return {key: torch.tensor(value) for key, value in padded.items()}

    times: list[float] = []

    class StepTimer(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            synchronize(options)
            times.append(-time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            synchronize(options)
            times[-1] += time.perf_counter()

    settings = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=BATCH,
        max_steps=options.steps + 1,
        learning_rate=LEARNING_RATE,
        weight_decay=0.0,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=options.device == "cpu",
        train_sampling_strategy="sequential",
        disable_tqdm=True,
    )
    initial_memory = read_memory(options)
    trainer = Trainer(tuned, settings, train_dataset=data, data_collator=collate, callbacks=[StepTimer()])
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    tokens = sum(len(prompt) + len(answer) + 1 for prompt, answer in rows[BATCH : BATCH * (options.steps + 1)])
    figures = compute_figures(times[1:], initial_memory, options, model, tokens / options.steps)
    return figures | {"first_loss": losses[0], "last_loss": losses[-1]}


def measure_steps(run_step: Callable[[int], None], options: argparse.Namespace, model: Any, tokens: float) -> dict[str, float]:
    """Run the steps, and compute the figures of all but the first.

    Args:
        run_step: function that runs the step of a number.
        options: command-line options.
        model: the frozen model.
        tokens: tokens per step that the model computes, without padding.
    """
    initial_memory = read_memory(options)
    times: list[float] = []
    for number in range(options.steps + 1):
        start = time.perf_counter()
        run_step(number)
        synchronize(options)
        times.append(time.perf_counter() - start)
    return compute_figures(times[1:], initial_memory, options, model, tokens)


def compute_figures(
    times: list[float], initial_memory: float, options: argparse.Namespace, model: Any, tokens: float
) -> dict[str, float]:
    """Compute the figures of a measurement.

    Args:
        times: seconds of each step.
        initial_memory: memory before the first step in GiB.
        options: command-line options.
        model: the frozen model.
        tokens: tokens per step that the model computes, without padding.

    Returns:
        Median seconds of a step, peak memory, peak memory above the initial memory, tokens per step, and reached share of the
        speed of a matrix product.
    """
    body = sum(parameter.numel() for parameter in model.get_decoder().layers.parameters())
    head = model.get_output_embeddings().weight.numel() * ANSWER_TOKENS * BATCH / tokens
    # A weight costs two FLOPs in the forward pass and two for the gradient of the inputs. Frozen weights have no gradient.
    flops = 4 * tokens * (body + head)
    seconds = statistics.median(times)
    # The matrix product allocates memory as well, so that the peak is read before it.
    peak_memory = read_peak_memory(options)
    return {
        "seconds": seconds,
        "peak_gib": peak_memory,
        "above_model_gib": peak_memory - initial_memory,
        "tokens": tokens,
        "share_of_peak": flops / seconds / measure_matrix_speed(options, model.dtype),
    }


def build_initial_vector(model: Any) -> torch.Tensor:
    """Copy a row of the input embeddings."""
    return model.get_input_embeddings().weight[100:101].detach().float().cpu().clone()


def synchronize(options: argparse.Namespace) -> None:
    """Wait for the GPU, if there is one."""
    if options.device != "cpu":
        torch.cuda.synchronize()


def read_peak_memory(options: argparse.Namespace) -> float:
    """Return the peak memory of this process in GiB."""
    if options.device != "cpu":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def read_memory(options: argparse.Namespace) -> float:
    """Return the current memory of this process in GiB."""
    if options.device != "cpu":
        return torch.cuda.memory_allocated() / 2**30
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**30


def measure_matrix_speed(options: argparse.Namespace, dtype: torch.dtype) -> float:
    """Return the FLOP/s of a large matrix product, the fastest of five."""
    size = CPU_MATRIX_SIZE if options.device == "cpu" else GPU_MATRIX_SIZE
    matrix = torch.randn(size, size, device=options.device, dtype=dtype)
    best = float("inf")
    for _ in range(MATRIX_PRODUCTS):
        synchronize(options)
        start = time.perf_counter()
        _ = matrix @ matrix
        synchronize(options)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def build_report(results: dict[str, list[dict[str, float]]], options: argparse.Namespace) -> list[dict[str, object]]:
    """Build the lines of the report: medians with ranges, and ratios that are paired by round."""
    share_goal = None if options.device == "cpu" else MIN_GPU_SHARE
    goals = {"seconds": MIN_SPEED_RATIO, "peak_gib": MAX_MEMORY_RATIO, "share_of_peak": share_goal}
    lines: list[dict[str, object]] = []
    for key, unit in (
        ("seconds", "s/step"),
        ("peak_gib", "GiB"),
        ("above_model_gib", "GiB"),
        ("tokens", "tokens/step"),
        ("share_of_peak", "share"),
    ):
        values, peer_values = ([result[key] for result in results[name]] for name in ("trimtab", "peft"))
        ratios = [
            peer_value / value if key == "seconds" else value / peer_value
            for value, peer_value in zip(values, peer_values, strict=True)
        ]
        ratio, goal = statistics.median(ratios), goals.get(key)
        median = statistics.median(values)
        compared = median if key == "share_of_peak" else ratio
        met = None if goal is None else (compared <= goal if key == "peak_gib" else compared >= goal)
        peer = {"peft prompt tuning, Trainer": statistics.median(peer_values), "spread": [min(peer_values), max(peer_values)]}
        lines.append(
            {
                "name": f"align.{options.shape}.{key}",
                "value": median,
                "unit": unit,
                "spread": [min(values), max(values)],
                "peer": peer,
                "ratio": ratio,
                "ratio_spread": [min(ratios), max(ratios)],
                "goal": goal,
                "met": met,
            }
        )
    gap = max(
        abs(result["first_loss"] - peer_result["first_loss"])
        for result, peer_result in zip(results["trimtab"], results["peft"], strict=True)
    )
    lines.append({"name": f"align.{options.shape}.first_loss_gap", "value": gap, "unit": "nats", "peer": None})
    lines[-1] |= {"ratio": None, "goal": MAX_LOSS_GAP, "met": gap <= MAX_LOSS_GAP}
    return lines


WORKERS = {"trimtab": run_trimtab, "peft": run_peft}

if __name__ == "__main__":
    main()
