"""Plot of the throughput against the number of distinct configurations."""

import re
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from peers.serve_report import Measurement

mpl.use("agg")
import matplotlib.pyplot as plt

CLIENTS = 32
NUMBER = re.compile(r"(\d+) (prefixes|LoRA adapters)")


def plot_throughput(measurements: Sequence[Measurement], path: Path) -> None:
    """Plot the tokens per second at `CLIENTS` clients: median and range over the rounds."""
    figure, axes = plt.subplots(figsize=(7, 4))
    rates: dict[str, list[float]] = {}
    for one in measurements:
        if one.clients == CLIENTS:
            rates.setdefault(one.mode, []).append(one.values["tokens_per_second"])
    points: dict[str, list[tuple[int, list[float]]]] = {"trimtab, prefixes": [], "vLLM, LoRA adapters": []}
    for mode, values in rates.items():
        if match := NUMBER.search(mode):
            points["vLLM, LoRA adapters" if mode.startswith("vllm") else "trimtab, prefixes"].append((int(match[1]), values))
    for label, unsorted in points.items():
        series = sorted(unsorted)
        if series:
            counts, medians = [count for count, _ in series], np.array([np.median(values) for _, values in series])
            errors = [medians - [min(values) for _, values in series], [max(values) for _, values in series] - medians]
            axes.errorbar(counts, medians, errors, marker="o", capsize=3, label=label)
    for mode, style in (("vllm", "--"), ("ray.serve.llm", ":"), ("trimtab", "-.")):
        if mode in rates:
            axes.axhline(float(np.median(rates[mode])), linestyle=style, color="gray", label=f"{mode}, one model")
    axes.set(xscale="log", ylim=(0, None))
    axes.set(xlabel="distinct prefixes or adapters in the load", ylabel=f"tokens per second, {CLIENTS} clients")
    axes.legend()
    figure.savefig(path, bbox_inches="tight", dpi=150)
