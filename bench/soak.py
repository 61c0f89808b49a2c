"""Soak test of a server: memory, descriptors, threads and metric series under a mixed load, with checks of every answer.

python bench/soak.py [--quick] [--minutes 60] [--leak MB_PER_MINUTE] [--json FILE]

Two replicas, 64 clients, chats, streams, responses, messages, completions and scores with several prefixes and a detector;
clients that leave their streams, a promotion every 30 s, keys that are added and removed. `--leak` makes every Ray worker grow,
to show that the bench finds it.
"""

import argparse
import asyncio
import io
import json
import tempfile
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peers import servers
from peers.detectors import save_untrained_detector
from peers.homes import own_home
from peers.keys import add_key
from peers.processes import ProcessSamples, estimate_slope
from peers.servers import Server
from peers.soak_load import Outcome, Scenario, SoakLoad, compute_expected, count_series

from trimtab.artifacts.card import PrefixCard
from trimtab.artifacts.prefix import build_prefix, save_prefix
from trimtab.model.base_model import BaseModel, resolve_base_model
from trimtab.serve.api_keys import RemoveConfig, run_keys_remove
from trimtab.stats.intervals import Interval
from trimtab.tracking import registry, runs
from trimtab.tracking.promotions import promote_version
from trimtab.tracking.registry import Version

CLIENTS, MINUTES, QUICK_MINUTES = 64, 60.0, 5.0
PROMOTION_SECONDS, KEY_SECONDS = 30.0, 20.0
# Share of the time that does not count: caches, allocators and compiled code fill up.
WARM_UP = 0.25
# Growth in MB per minute that counts as a leak: 0.72 GB a day.
LIMIT = 0.5
LEAK = Path(__file__).parent / "peers" / "leak"
MOVED, OTHERS = "moved", ("p0", "p1", "p2")
QUESTIONS = ("What is the capital of France?", "Name three fruits.", "How do I bake bread?", "Tell me a story.", "Who are you?")


def main() -> None:
    options = parse_arguments()
    minutes = options.minutes or (QUICK_MINUTES if options.quick else MINUTES)
    with tempfile.TemporaryDirectory(prefix="soak-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        own_home(folder / "home")
        base = resolve_base_model(options.base)
        versions = register_versions(base, folder)
        keys = str(folder / "keys.json")
        token = add_key("clients", keys)
        command = servers.build_trimtab_command(
            base.name, "--num_replicas", "2", "--api_key_file", keys, "--engine.num_slots", "16"
        )
        command += ["--engine.max_model_len", "256", "--engine.max_num_seqs", str(CLIENTS)]
        leak = {"PYTHONPATH": str(LEAK), "SOAK_LEAK_MB_PER_MINUTE": str(options.leak)} if options.leak else {}
        with servers.run_server(Server("soak", command, environment=leak), {"authorization": f"Bearer {token}"}) as up:
            scenario = Scenario(up.url, token, base.name, MOVED, OTHERS, QUESTIONS, {})
            samples = ProcessSamples(up.process.pid)
            outcome, series = asyncio.run(soak(scenario, samples, versions, keys, minutes * 60))
    lines = report(outcome, samples, series, minutes, options.leak)
    print(json.dumps(lines, indent=1))
    if options.json:
        Path(options.json).write_text(json.dumps(lines, indent=1) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_MINUTES:g} minutes")
    parser.add_argument("--minutes", type=float, help="duration of the load")
    parser.add_argument("--leak", type=float, default=0.0, help="MB per minute by which every Ray worker grows")
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--base", default="smollm2-135m")
    return parser.parse_args()


def register_versions(base: BaseModel, folder: Path) -> dict[int, Version]:
    """Register prefixes that change answers, two versions of one of them, and a detector; return the two versions."""
    weights: torch.Tensor = base.load("fp32").get_input_embeddings().weight  # pyright: ignore[reportAssignmentType]
    table = weights.detach()
    generator = torch.Generator().manual_seed(0)
    run = runs.start_run("soak", "align", folder)
    versions: dict[int, Version] = {}
    for number, name in enumerate((MOVED, MOVED, *OTHERS)):
        card = PrefixCard("prefix", name, base.name, base.fingerprint, "system", 0, 0, "")
        vectors = table[torch.randint(len(table), (1,), generator=generator)] * 4
        version = registry.register_version(save_prefix(build_prefix(vectors, card), folder / str(number)), run.run_id)
        if version.version == 1:
            promote_version(version, "soak")
        if name == MOVED:
            versions[version.version] = version
    promote_version(registry.register_version(save_untrained_detector(base, folder / "detectors"), run.run_id), "soak")
    run.finish("FINISHED")
    return versions


def remove_key(name: str, file: str) -> None:
    with redirect_stdout(io.StringIO()):
        run_keys_remove(RemoveConfig(name, file=file))


async def soak(
    scenario: Scenario, samples: ProcessSamples, versions: dict[int, Version], keys: str, seconds: float
) -> tuple[Outcome, list[int]]:
    """Run the load; return its outcome, and the number of metric series over time."""
    names = [f"{scenario.base}:{MOVED}@{number}" for number in versions] + [f"{scenario.base}:{name}" for name in OTHERS]
    await compute_expected(scenario, [scenario.base, *names])
    load, series, interval = SoakLoad(scenario), list[int](), max(5.0, seconds / 200)

    def promote(number: int) -> None:
        promote_version(versions[number], "soak")

    tasks = [asyncio.create_task(load.run_client()) for _ in range(CLIENTS)]
    tasks.append(asyncio.create_task(load.promote(promote, PROMOTION_SECONDS)))
    tasks.append(
        asyncio.create_task(load.change_keys(partial(add_key, file=keys), partial(remove_key, file=keys), KEY_SECONDS))
    )
    loop, printed = asyncio.get_running_loop(), 0.0
    began = loop.time()
    while (elapsed := loop.time() - began) < seconds:
        await asyncio.to_thread(samples.take)
        series.append(await count_series(scenario))
        if elapsed - printed >= seconds / 20:
            printed = elapsed
            counts = f"{load.outcome.requests} requests, {len(load.outcome.failed)} failed, {len(load.outcome.wrong)} wrong"
            print(f"{elapsed / 60:.1f} of {seconds / 60:g} minutes: {counts}, {series[-1]} series", flush=True)
        await asyncio.sleep(interval)
    load.stopped.set()
    await asyncio.gather(*tasks)
    return load.outcome, series


def report(outcome: Outcome, samples: ProcessSamples, series: list[int], minutes: float, leak: float) -> list[dict[str, Any]]:
    """Build the lines of the report. With a leak, the goal is to find it in the replicas."""
    for text in [*outcome.failed[:5], *outcome.wrong[:5]]:
        print(text)
    lines = [
        build_line("requests", outcome.requests, "requests", None, None),
        build_line("failed requests", len(outcome.failed), "requests", 0, not outcome.failed),
        build_line("wrong answers", len(outcome.wrong), "answers", 0, not outcome.wrong),
        build_line("promotions", outcome.statuses["promotion"], "promotions", None, None),
        build_line("streams left", outcome.statuses["stream left 200"], "streams", None, None),
        build_line(
            "metric series, growth after the warm-up", series[-1] - series[int(len(series) * WARM_UP)], "series", None, None
        ),
    ]
    for name, lasting in samples.list_lasting(minutes * 60 * WARM_UP).items():
        slope = estimate_slope(lasting)
        if leak and name.startswith("replica"):
            lines.append(
                build_line(f"{name}: injected leak is found", int(slope.low > LIMIT), "yes or no", 1, slope.low > LIMIT)
            )
        line = build_line(f"{name}: growth", slope.value, "MB per minute", LIMIT, decide(slope))
        first, last = lasting[0], lasting[-1]
        figures = {"low": slope.low, "high": slope.high, "megabytes": last.memory / 1e6}
        figures |= {"descriptors": [first.descriptors, last.descriptors], "threads": [first.threads, last.threads]}
        lines.append(line | figures)
    return lines


def decide(slope: Interval) -> bool | None:
    """Return whether the growth is below the limit; None if the interval contains it."""
    return True if slope.high < LIMIT else False if slope.low > LIMIT else None


def build_line(name: str, value: float, unit: str, goal: float | None, met: bool | None) -> dict[str, Any]:
    return {"name": name, "value": value, "unit": unit, "peer": None, "ratio": None, "goal": goal, "met": met}


if __name__ == "__main__":
    main()
