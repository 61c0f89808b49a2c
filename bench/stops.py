"""Streams that a policy stops: delay after the threshold is crossed, release of the engine's slot, and cost of the checks.

python bench/stops.py [--quick] [--json FILE]

One server with a champion of answers. Greedy answers are generated without a policy, and transformers recomputes the risk after
each of their tokens. Then each question is streamed with a policy that stops answers, while other clients keep the engine busy.
The delay is the number of tokens between the first risk above the threshold and the end of the stream. For the cost, streams
with a policy that never triggers take turns with streams that have the same detector and no policy. The release is measured on
an engine that runs one request at a time: a short request that follows a stopped stream waits for its slot.
"""

import argparse
import asyncio
import json
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import torch
from peers import servers
from peers.detectors import save_untrained_detector
from peers.homes import own_home
from peers.ratios import build_line
from peers.servers import Server
from transformers import AutoModelForCausalLM

from trimtab.detection.detector import Detector, load_detector
from trimtab.detection.signals import CHECK_INTERVAL, compute_token_statistics, concatenate_states
from trimtab.generation_types import Signals
from trimtab.model.base_model import BaseModel, resolve_base_model

QUESTIONS, QUICK_QUESTIONS = 200, 40
PAIRS, QUICK_PAIRS = 40, 10
CLIENTS, TOKENS = 8, 48
# Goals: tokens after the crossing, seconds until the slot is free, and cost of the checks.
MOST_TOKENS, MOST_SECONDS, SLOWDOWN = 16, 1.0, 1.05
RELEASES = 20
TOPICS = ("bread", "the moon", "a garden", "old maps", "trains", "a small boat", "winter", "bees", "salt", "wool")


def main() -> None:
    options = parse_arguments()
    count, pairs = (QUICK_QUESTIONS, QUICK_PAIRS) if options.quick else (QUESTIONS, PAIRS)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(prefix="stops-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        own_home(folder / "home")
        base = resolve_base_model(options.base)
        registry = folder / "registry"
        detector = load_detector(save_untrained_detector(base, registry), base)
        command = servers.build_trimtab_command(base.name, "--registry", str(registry), "--engine.max_model_len", "512")
        with servers.run_server(Server("stops", command)) as up:
            lines = asyncio.run(StopBench(up.url, base, detector).run(count, pairs))
        with servers.run_server(Server("one slot", [*command, "--engine.max_num_seqs", "1"])) as up:
            lines.append(asyncio.run(StopBench(up.url, base, detector).measure_release()))
    print(json.dumps(lines, indent=1))
    if options.json:
        Path(options.json).write_text(json.dumps(lines, indent=1) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_QUESTIONS} questions instead of {QUESTIONS}")
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--base", default="smollm2-135m")
    return parser.parse_args()


class StopBench:
    """Measurements on a running server.

    Args:
        url: URL of the server.
        base: base model.
        detector: champion of the server.
    """

    def __init__(self, url: str, base: BaseModel, detector: Detector) -> None:
        self._url = url
        self._base = base
        self._detector = detector
        self._model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32).eval()
        self._random = random.Random(0)

    async def run(self, count: int, pairs: int) -> list[dict[str, Any]]:
        """Run all measurements, and return the lines of the report."""
        questions = [f"Number {n}: write a story about {', '.join(self._random.choices(TOPICS, k=4))}." for n in range(count)]
        async with httpx.AsyncClient(base_url=self._url, timeout=300) as client:
            answers = await asyncio.gather(*(self._generate(client, question) for question in questions))
            risks = [self._compute_risks(*answer) for answer in answers]
            highest = sorted(max(values[CHECK_INTERVAL - 1 :: CHECK_INTERVAL]) for values in risks)
            # A third of the answers stay below.
            threshold = (highest[count // 3] + highest[count // 3 + 1]) / 2
            policy = {"detector": "truth", "action": "stop", "threshold": threshold}
            lengths = await self._stream_under_load(client, questions, policy)
            costs = [await self._compare_cost(client) for _ in range(pairs)]
        return [*describe_delays(risks, lengths, threshold), describe_cost(costs)]

    async def measure_release(self) -> dict[str, Any]:
        """Measure how much longer a short request takes directly after a stopped stream, on an engine with one place."""
        policy = {"detector": "truth", "action": "stop", "threshold": 0.0}
        delays: list[float] = []
        async with httpx.AsyncClient(base_url=self._url, timeout=300) as client:
            for number in range(RELEASES):
                alone = await self._time_short_request(client, number)
                await self._stream(client, f"Number {number}: write a story.", policy)
                delays.append(await self._time_short_request(client, -1 - number) - alone)
        return describe_release(delays)

    async def _generate(self, client: httpx.AsyncClient, question: str) -> tuple[list[int], list[int]]:
        """Return the token ids of the prompt and of its greedy answer."""
        body = self._build_request(question) | {"return_token_ids": True}
        response = (await client.post("/v1/chat/completions", json=body)).raise_for_status().json()
        return response["prompt_token_ids"], response["choices"][0]["token_ids"]

    @torch.no_grad()
    def _compute_risks(self, prompt: list[int], answer: list[int]) -> list[float]:
        """Compute the risk after each token of an answer with transformers."""
        ids = torch.tensor([[*prompt, *answer]])
        output = self._model(ids, output_hidden_states=True)
        layers = self._detector.card.layers
        states = torch.stack([output.hidden_states[layer][0] for layer in layers], 1)
        start, question = len(prompt) - 1, states[: len(prompt)].mean(0)
        statistics = compute_token_statistics(output.logits[0, start:-1], ids[0, len(prompt) :])
        history = torch.stack([statistics.logp, statistics.entropy, statistics.margin], 1)
        risks: list[float] = []
        for tokens in range(1, len(answer) + 1):
            part = states[start : start + tokens]
            psi = concatenate_states(part[-1], part.mean(0), question)
            risks.append(self._detector.score_answer(Signals(psi, history[:tokens]), layers))
        return risks

    async def _stream_under_load(self, client: httpx.AsyncClient, questions: Sequence[str], policy: Any) -> list[int]:
        """Return the number of tokens of each stream; 0 for those that are not stopped. Other clients send requests as well."""
        done = asyncio.Event()

        async def send_others() -> None:
            while not done.is_set():
                text = f"Tell me about {self._random.choice(TOPICS)}, please. {self._random.random()}"
                await client.post("/v1/chat/completions", json=self._build_request(text))

        others = [asyncio.create_task(send_others()) for _ in range(CLIENTS)]
        places = asyncio.Semaphore(CLIENTS)

        async def stream(question: str) -> int:
            async with places:
                return await self._stream(client, question, policy)

        try:
            return await asyncio.gather(*map(stream, questions))
        finally:
            done.set()
            await asyncio.gather(*others)

    async def _stream(self, client: httpx.AsyncClient, question: str, policy: Any) -> int:
        body = self._build_request(question, policy) | {"stream": True, "stream_options": {"include_usage": True}}
        stopped, tokens = False, 0
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                stopped = stopped or '"finish_reason":"content_filter"' in line
                if '"usage":{' in line:
                    tokens = json.loads(line.removeprefix("data: "))["usage"]["completion_tokens"]
        return tokens if stopped else 0

    async def _time_short_request(self, client: httpx.AsyncClient, number: int) -> float:
        """Return the time of a request for one token (seconds)."""
        body = self._build_request(f"Say {number}.") | {"max_tokens": 1}
        began = time.perf_counter()
        (await client.post("/v1/chat/completions", json=body)).raise_for_status()
        return time.perf_counter() - began

    async def _compare_cost(self, client: httpx.AsyncClient) -> tuple[float, float]:
        """Return the times of a stream with a check at every interval, and of one without (seconds), in random order."""
        never = {"detector": "truth", "action": "stop", "threshold": 1.0}
        times: dict[bool, float] = {}
        for checked in self._random.sample((True, False), 2):
            question = f"Tell me about {', '.join(self._random.choices(TOPICS, k=6))}. {self._random.random()}"
            began = time.perf_counter()
            await self._stream(client, question, never if checked else None)
            times[checked] = time.perf_counter() - began
        return times[True], times[False]

    def _build_request(self, question: str, policy: Any = None) -> dict[str, Any]:
        request = {"model": self._base.name, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
        messages = [{"role": "user", "content": question}]
        return request | {"messages": messages, "trimtab": {"policies": [policy] if policy else []}}


def describe_delays(risks: Sequence[Sequence[float]], lengths: Sequence[int], threshold: float) -> list[dict[str, Any]]:
    """Describe the tokens between crossing and end, for crossings at any token and at a check, and the streams in time."""
    lines: list[dict[str, Any]] = []
    for name, step in (("at any token", 1), ("at a check", CHECK_INTERVAL)):
        delays: list[int | None] = []
        for values, length in zip(risks, lengths, strict=True):
            crossed = next((n for n in range(step, len(values) + 1, step) if values[n - 1] > threshold), 0)
            # An answer whose last tokens cross has ended before it could be stopped.
            if crossed and crossed + MOST_TOKENS <= len(values):
                delays.append(length - crossed if length else None)
        in_time = sum(delay is not None and 0 <= delay <= MOST_TOKENS for delay in delays)
        ended = [delay for delay in delays if delay is not None]
        lines.append(
            describe(f"streams that end within {MOST_TOKENS} tokens of a crossing {name}", in_time, "streams", len(delays))
        )
        lines.append(describe(f"median tokens after a crossing {name}", median(ended), "tokens", None))
    early = [n for n, (values, length) in enumerate(zip(risks, lengths, strict=True)) if length and max(values) <= threshold]
    return [*lines, describe("streams that end without a crossing", len(early), "streams", 0)]


def describe_release(seconds: Sequence[float]) -> dict[str, Any]:
    line = describe("longest delay of a short request after a stopped stream, one slot", max(seconds), "s", None)
    return line | {"goal": MOST_SECONDS, "met": max(seconds) <= MOST_SECONDS}


def describe_cost(times: Sequence[tuple[float, float]]) -> dict[str, Any]:
    checked, plain = zip(*times, strict=True)
    return build_line(f"{TOKENS} tokens with checks", checked, plain, float, SLOWDOWN)


def describe(name: str, value: float, unit: str, goal: float | None) -> dict[str, Any]:
    print(f"{name}: {value:.4g} {unit}" + ("" if goal is None else f" of {goal:g}"), flush=True)
    met = None if goal is None else value == goal
    return {"name": name, "value": value, "unit": unit, "peer": None, "ratio": None, "goal": goal, "met": met}


if __name__ == "__main__":
    main()
