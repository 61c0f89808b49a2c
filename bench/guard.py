"""Cost of a guard: a detector that checks each prompt in the engine, against no check and against a second request.

python bench/guard.py [--quick] [--json FILE]

One server with a champion that reads prompts at one layer. A client streams answers one after another, in pairs of a request
without a policy and one whose policy never triggers, in random order; then many clients do. A refused request and a plain one
take turns, and so do a request that is checked in the engine and one that is checked by a moderation request before it. The
same holds for a prefix with a condition on either side and the same prefix without one. The
time of the check in the worker, and of the whole capture, is measured in an engine of its own, as a share of its steps.
"""

import argparse
import asyncio
import json
import random
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from peers import servers
from peers.detectors import save_untrained_guard
from peers.homes import own_home
from peers.ratios import build_line
from peers.servers import Server, save_random_prefixes
from vllm import SamplingParams

from trimtab.artifacts.card import PrefixCondition
from trimtab.artifacts.prefix import load_prefix, save_prefix
from trimtab.detection.detector import Detector, encode_detector, load_detector
from trimtab.engine.checks import UNTRACKED, PromptCheck, RequestChecks, encode_checks
from trimtab.engine.config import EngineConfig
from trimtab.engine.offline import Engine
from trimtab.engine.vllm_ext.args import get_verdict_token
from trimtab.model.base_model import BaseModel, resolve_base_model

PAIRS, QUICK_PAIRS = 60, 20
CLIENTS = 8
TOKENS = 24
LAYER = 18
# Goals: share of a step, and cost of an unflagged request.
STEP_SHARE, SLOWDOWN = 0.01, 1.05
TOPICS = ("bread", "the moon", "a garden", "old maps", "trains", "a small boat", "winter", "bees")
# Thresholds of prefixes that steer prompts above them: all prompts, which are then read twice, or none.
CONDITIONS = {"steers": 0.0, "does not steer": 1.0}
NEVER = {"detector": "guard", "action": "refuse", "threshold": 1.0}
ALWAYS = {"detector": "guard", "action": "refuse", "threshold": 0.0}


def main() -> None:
    options = parse_arguments()
    pairs = QUICK_PAIRS if options.quick else PAIRS
    with tempfile.TemporaryDirectory(prefix="guard-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        own_home(folder / "home")
        base = resolve_base_model(options.base)
        registry = folder / "registry"
        saved = save_untrained_guard(base, registry, LAYER)
        save_random_prefixes(base, registry, 1)
        for name, threshold in CONDITIONS.items():
            save_conditional_prefix(registry, name, PrefixCondition("guard", "above", threshold))
        lines = measure_step_share(base, load_detector(saved, base), pairs)
        command = servers.build_trimtab_command(base.name, "--registry", str(registry), "--engine.max_model_len", "512")
        with servers.run_server(Server("guard", command)) as up:
            lines += GuardBench(up.url, base.name, pairs).run()
    print(json.dumps(lines, indent=1))
    if options.json:
        Path(options.json).write_text(json.dumps(lines, indent=1) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_PAIRS} pairs instead of {PAIRS}")
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--base", default="smollm2-135m")
    return parser.parse_args()


class GuardBench:
    """Measurements on a running server.

    Args:
        url: URL of the server.
        model: name of the base model.
        pairs: number of pairs of each measurement.
    """

    def __init__(self, url: str, model: str, pairs: int) -> None:
        self._url = url
        self._model = model
        self._pairs = pairs
        self._random = random.Random(0)
        self._number = 0

    def run(self) -> list[dict[str, Any]]:
        """Run all measurements, and return the lines of the report."""
        with httpx.Client(base_url=self._url, timeout=120) as client:
            for _ in range(8):
                self._stream(client, [])
            alone = self._alternate(lambda policies: self._stream(client, policies), NEVER)
            refused = self._alternate(lambda policies: self._stream(client, policies), ALWAYS)
            conditional = {name: self._alternate(lambda names: self._stream_prefix(client, names), name) for name in CONDITIONS}
            checked = [self._compare_moderation(client) for _ in range(self._pairs)]
        together = asyncio.run(self._run_clients())
        plain, guarded = zip(*alone, strict=True)
        lines = [
            build_line("first token, one client", guarded, plain, lambda sample: sample[0], SLOWDOWN),
            build_line("24 tokens, one client", guarded, plain, lambda sample: sample[1], SLOWDOWN),
        ]
        plain, guarded = zip(*together, strict=True)
        lines.append(build_line("24 tokens, 8 clients", guarded, plain, lambda sample: sample[1], SLOWDOWN))
        plain, stopped = zip(*refused, strict=True)
        lines.append(build_line("refusal against the first token of an answer", stopped, plain, lambda s: s[0], None))
        for name, samples in conditional.items():
            plain, steered = zip(*samples, strict=True)
            lines.append(build_line(f"first token, conditional prefix that {name}", steered, plain, lambda s: s[0], None))
        inside, before = zip(*checked, strict=True)
        lines.append(build_line("24 tokens, check by a second request", before, inside, lambda s: s[1], None))
        return lines

    def _alternate(self, send: Callable[[list[Any]], tuple[float, float]], policy: Any) -> list[tuple[Any, Any]]:
        """Send pairs of a plain request and one with a policy, in random order."""
        samples: list[tuple[Any, Any]] = []
        for _ in range(self._pairs):
            swapped = self._random.random() < 0.5
            first = send([policy] if swapped else [])
            second = send([] if swapped else [policy])
            samples.append((second, first) if swapped else (first, second))
        return samples

    def _compare_moderation(self, client: httpx.Client) -> tuple[tuple[float, float], tuple[float, float]]:
        """Time a request that the engine checks, and one after a moderation request."""
        inside = self._stream(client, [NEVER])
        began = time.perf_counter()
        text = self._build_text()
        client.post("/v1/moderations", json={"input": text}).raise_for_status()
        moderation = time.perf_counter() - began
        first, total = self._stream(client, [], text)
        return inside, (first + moderation, total + moderation)

    async def _run_clients(self) -> list[tuple[Any, Any]]:
        """Send pairs from many clients at a time."""
        async with httpx.AsyncClient(base_url=self._url, timeout=120) as client:
            runs = [self._run_client(client, -(-self._pairs // CLIENTS)) for _ in range(CLIENTS)]
            return [pair for pairs in await asyncio.gather(*runs) for pair in pairs]

    async def _run_client(self, client: httpx.AsyncClient, pairs: int) -> list[tuple[Any, Any]]:
        samples: list[tuple[Any, Any]] = []
        for _ in range(pairs):
            swapped = self._random.random() < 0.5
            times = []
            for guarded in (swapped, not swapped):
                began = time.perf_counter()
                response = await client.post("/v1/chat/completions", json=self._build_request([NEVER] if guarded else [], ""))
                response.raise_for_status()
                times.append((0.0, time.perf_counter() - began))
            samples.append((times[1], times[0]) if swapped else (times[0], times[1]))
        return samples

    def _stream_prefix(self, client: httpx.Client, names: list[Any]) -> tuple[float, float]:
        """Stream an answer with the named conditional prefix, or with the prefix without a condition."""
        return self._stream(client, [], prefix=names[0].replace(" ", "-") if names else "p0")

    def _stream(
        self, client: httpx.Client, policies: list[Any], text: str = "", prefix: str | None = None
    ) -> tuple[float, float]:
        """Return the times until the first text and until the end of a stream (seconds)."""
        body = self._build_request(policies, text) | {"stream": True}
        if prefix:
            body["model"] = f"{self._model}:{prefix}"
        began, first = time.perf_counter(), 0.0
        with client.stream("POST", "/v1/chat/completions", json=body) as response:
            response.raise_for_status()
            for line in response.iter_lines():
                if not first and '"content":"' in line and '"content":""' not in line:
                    first = time.perf_counter() - began
        return first, time.perf_counter() - began

    def _build_request(self, policies: list[Any], text: str) -> dict[str, Any]:
        request = {"model": self._model, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
        messages = [{"role": "user", "content": text or self._build_text()}]
        return request | {"messages": messages, "trimtab": {"policies": policies, "detector": "off"}}

    def _build_text(self) -> str:
        """Return a text that no earlier request has sent, so that the prefix cache does not have it."""
        self._number += 1
        topics = ", ".join(self._random.choices(TOPICS, k=8))
        return f"Number {self._number}: write a story about {topics}."


def save_conditional_prefix(registry: Path, name: str, condition: PrefixCondition) -> None:
    """Save the prefix `p0` of the registry with a condition, as champion of another name."""
    prefix = load_prefix(registry / "p0" / "1")
    folder = name.replace(" ", "-")
    card = replace(prefix.card, name=folder, condition=condition)
    save_prefix(replace(prefix, card=card), registry / folder / "1")
    (registry / folder / "aliases.json").write_text('{"champion": 1}')


def measure_step_share(base: BaseModel, detector: Detector, prompts: int) -> list[dict[str, Any]]:
    """Measure the time of the checks as a share of the steps that end a prefill, and of all steps."""
    layers = tuple(detector.card.layers)
    config = EngineConfig(num_slots=8, dtype="fp32", max_model_len=512, layers=layers)
    with Engine(base, config) as engine:
        # The bench measures inside the engine, which has no public access to its worker.
        llm: Any = vars(engine)["_llm"]
        core = llm.llm_engine.engine_core.engine_core
        worker = core.model_executor.driver_worker.worker
        llm.collective_rpc("trimtab_add_detector", args=encode_detector(detector))
        check = PromptCheck(detector.card.digest, 1.0, stops=True, required=True)
        sampling = SamplingParams(
            max_tokens=TOKENS,
            temperature=0,
            ignore_eos=True,
            extra_args=encode_checks(RequestChecks([check])) | {UNTRACKED: True},
            stop_token_ids=[get_verdict_token(base, config)],
        )
        texts = [f"Number {number}: write a story about {', '.join(TOPICS)}." for number in range(prompts)]
        ids = [engine.renderer.render_prompt([{"role": "user", "content": text}]) for text in texts]
        llm.generate([{"prompt_token_ids": ids[0]}], sampling, use_tqdm=False)
        with ExitStack() as stack:
            steps = stack.enter_context(record_times(worker, "execute_model"))
            checks = stack.enter_context(record_times(worker.capture, "_check_prompts"))
            parts = [stack.enter_context(record_times(worker.capture, name)) for name in ("begin_step", "accumulate_step")]
            llm.generate([{"prompt_token_ids": item} for item in ids[1:]], sampling, use_tqdm=False)
    ended = [max(step for step in steps if step[0] <= at) for at, _ in checks]
    shares = [check / step for (_, check), (_, step) in zip(checks, ended, strict=True)]
    total = sum(step for _, step in steps)
    share, capture = sum(check for _, check in checks) / total, sum(time for part in parts for _, time in part) / total
    return [
        describe("time of the check, share of a step that ends a prefill", float(np.median(shares)), "share", STEP_SHARE),
        describe("time of the check, share of all steps", share, "share", STEP_SHARE),
        describe("time of check and capture, share of all steps", capture, "share", STEP_SHARE),
        describe("time of the check", float(np.median([check for _, check in checks])) * 1e6, "us", None),
    ]


@contextmanager
def record_times(owner: Any, name: str) -> Generator[list[tuple[float, float]]]:
    """Record start and duration of each call of a method (seconds)."""
    recorded: list[tuple[float, float]] = []
    original = getattr(owner, name)

    def timed(*args: Any, **options: Any) -> Any:
        began = time.perf_counter()
        result = original(*args, **options)
        recorded.append((began, time.perf_counter() - began))
        return result

    setattr(owner, name, timed)
    try:
        yield recorded
    finally:
        setattr(owner, name, original)


def describe(name: str, value: float, unit: str, goal: float | None) -> dict[str, Any]:
    print(f"{name}: {value:.4g} {unit}", flush=True)
    met = None if goal is None else value <= goal
    return {"name": name, "value": value, "unit": unit, "peer": None, "ratio": None, "goal": goal, "met": met}


if __name__ == "__main__":
    main()
