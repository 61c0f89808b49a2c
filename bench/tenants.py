"""Cost of a system prompt per tenant, as text and as a prefix: time to first token, throughput and KV memory.

python bench/tenants.py [--quick] [--json FILE]

One server. Each tenant has a system prompt of about 1,000 tokens, and a prefix of 16 rows. Requests stream, one after another:
without a system prompt, with one prompt that all tenants share, with the prompts of the tenants (first and second request of
each), and with their prefixes. Then 8 clients send requests of random tenants. The prefixes are random: their cost does not
depend on their values. A second server has more slots than rows of all prefixes, so that no prefix is evicted. Only prefixes
are measured there.
"""

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import torch
from peers import servers
from peers.homes import own_home
from peers.ratios import build_line
from peers.servers import Server

from trimtab.artifacts.card import PrefixCard
from trimtab.artifacts.prefix import build_prefix, save_prefix
from trimtab.data.texts import read_all_texts
from trimtab.model.base_model import BaseModel, resolve_base_model

TENANTS, QUICK_TENANTS = 64, 8
ROWS, SYSTEM_TOKENS, ANSWER_TOKENS = 16, 1000, 16
CLIENTS = 8
# Requests of each tenant under load.
REQUESTS_PER_TENANT = 2
# Slots of the two servers: fewer and more than the rows of all prefixes.
FEW_SLOTS, MANY_SLOTS = 256, 1600
LENGTH = 2048
QUESTIONS = ("What can you do?", "How do I begin?", "When are you open?", "Who are you?", "Can you help me with a letter?")
# A first token of a tenant's first request must come in less than this share of the time with its prompt as text.
GOAL = 0.5

Body = dict[str, Any]


def main() -> None:
    options = parse_arguments()
    tenants = QUICK_TENANTS if options.quick else options.tenants
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="tenants-", ignore_cleanup_errors=True) as name:
        own_home(Path(name) / "home")
        base = resolve_base_model(options.base)
        prompts = build_system_prompts(base, tenants)
        save_prefixes(base, Path(name) / "registry", tenants)
        lines += report_memory(base)
        for slots in (FEW_SLOTS, MANY_SLOTS):
            command = servers.build_trimtab_command(base.name, "--registry", str(Path(name) / "registry"), "--detect", "false")
            command += ["--engine.max_model_len", str(LENGTH), "--engine.num_slots", str(slots)]
            command += ["--engine.cpu_kv_cache_gib", str(options.kv_gib)]
            with servers.run_server(Server("tenants", command)) as up:
                lines += TenantBench(up.url, base.name, prompts, slots, with_prompts=slots == FEW_SLOTS).run()
    print(json.dumps(lines, indent=1))
    if options.json:
        Path(options.json).write_text(json.dumps(lines, indent=1) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_TENANTS} tenants instead of {TENANTS}")
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--tenants", type=int, default=TENANTS)
    parser.add_argument("--kv_gib", type=int, default=1, help="memory of the KV cache in GiB")
    return parser.parse_args()


def build_system_prompts(base: BaseModel, count: int) -> list[str]:
    """Build different system prompts of about `SYSTEM_TOKENS` tokens from neutral texts of the project."""
    tokenizer = base.tokenizer()
    texts = [text.target or "" for text in read_all_texts(["trimtab:neutral"])]
    prompts: list[str] = []
    for number in range(count):
        chosen = random.Random(number).sample(texts, len(texts))
        ids = tokenizer.encode(f"You answer for tenant {number}. " + " ".join(chosen), add_special_tokens=False)
        prompts.append(str(tokenizer.decode(ids[:SYSTEM_TOKENS])))
    return prompts


def save_prefixes(base: BaseModel, registry: Path, count: int) -> None:
    """Save a prefix of `ROWS` random rows for each tenant."""
    generator = torch.Generator().manual_seed(0)
    for number in range(count):
        card = PrefixCard("prefix", f"tenant{number}", base.name, base.fingerprint, "system", 0, 0, "")
        folder = registry / card.name
        save_prefix(build_prefix(0.1 * torch.randn(ROWS, base.width, generator=generator), card), folder / "1")
        (folder / "aliases.json").write_text('{"champion": 1}')


def report_memory(base: BaseModel) -> list[dict[str, Any]]:
    """Compute the KV bytes of the system prompts of tenants, as text and as prefixes."""
    config = base.load("fp32").config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_token = 2 * config.num_hidden_layers * heads * width * 4
    lines: list[dict[str, Any]] = []
    for tenants in (1, 64, 1000):
        text, rows = (tenants * tokens * per_token / 2**20 for tokens in (SYSTEM_TOKENS, ROWS))
        line = {"name": f"tenants.kv_memory.{tenants}", "value": rows, "unit": "MiB, fp32", "peer": {"text": text}}
        lines.append(line | {"ratio": rows / text, "goal": None, "met": None})
    return lines


class TenantBench:
    """Measurements on one server.

    Args:
        url: URL of the server.
        base: name of the base model.
        prompts: system prompt of each tenant.
        slots: number of slots of the server.
        with_prompts: whether system prompts as text are measured as well.
    """

    def __init__(self, url: str, base: str, prompts: Sequence[str], slots: int, *, with_prompts: bool) -> None:
        self._url = url
        self._base = base
        self._prompts = prompts
        self._slots = slots
        self._with_prompts = with_prompts
        self._random = random.Random(0)

    def run(self) -> list[dict[str, Any]]:
        """Measure all modes and build the lines of the report."""
        return asyncio.run(self._measure())

    async def _measure(self) -> list[dict[str, Any]]:
        tenants = range(len(self._prompts))
        async with httpx.AsyncClient(timeout=300) as client:
            # The first requests of a server compile and allocate.
            await self._measure_first_tokens(client, [self._build_body(None, None) for _ in range(4)])
            first = {
                "no prompt": [self._build_body(None, None) for _ in tenants],
                "prefixes, first request": [self._build_body(None, i) for i in tenants],
                "prefixes, second request": [self._build_body(None, i) for i in tenants],
            }
            loads: dict[str, Callable[[int], Body]] = {
                "no prompt": lambda _: self._build_body(None, None),
                "prefixes": lambda i: self._build_body(None, i),
            }
            if self._with_prompts:
                # One request before warms the shared prompt up.
                await self._send(client, self._build_body(self._prompts[0], None))
                first |= {
                    "shared prompt": [self._build_body(self._prompts[0], None) for _ in tenants],
                    "prompts, first request": [self._build_body(self._prompts[i], None) for i in tenants],
                    "prompts, second request": [self._build_body(self._prompts[i], None) for i in tenants],
                }
                loads |= {
                    "shared prompt": lambda _: self._build_body(self._prompts[0], None),
                    "prompts": lambda i: self._build_body(self._prompts[i], None),
                }
            times = {name: await self._measure_first_tokens(client, bodies) for name, bodies in first.items()}
            rates: dict[str, float] = {}
            draws = [self._random.choice(tenants) for _ in range(REQUESTS_PER_TENANT * len(tenants))]
            for name, build in loads.items():
                rates[name] = await self._measure_throughput(client, [build(i) for i in draws])
            used = await self._read_metric(client, "trimtab_slots_used")
            writes = await self._read_metric(client, "trimtab_prefix_writes_total")
        lines = [
            build_line(f"tenants.{self._slots}.first_token.{name}", values, times["no prompt"], float, None)
            for name, values in times.items()
        ]
        goals = {"first": GOAL, "second": None} if self._with_prompts else {}
        for name, goal in goals.items():
            ours, theirs = f"prefixes, {name} request", f"prompts, {name} request"
            key = f"tenants.{self._slots}.prefix_against_prompt.{name}"
            lines.append(build_line(key, times[ours], times[theirs], float, goal))
        for name, rate in rates.items():
            line = {"name": f"tenants.{self._slots}.tokens_per_second.{name}", "value": rate, "unit": "tokens/s", "goal": None}
            lines.append(line | {"peer": {"no prompt": rates["no prompt"]}, "ratio": rate / rates["no prompt"], "met": None})
            print(f"{line['name']}: {rate:.1f} tokens/s", flush=True)
        rest = {"peer": None, "ratio": None, "goal": None, "met": None}
        lines.append({"name": f"tenants.{self._slots}.slots_used", "value": used, "unit": "slots"} | rest)
        return [*lines, {"name": f"tenants.{self._slots}.prefix_writes", "value": writes, "unit": "prefixes"} | rest]

    def _build_body(self, system: str | None, tenant: int | None) -> Body:
        # A number makes each user message a new one, so that only system prompts are in the cache.
        user = {"role": "user", "content": f"({self._random.random():.6f}) {self._random.choice(QUESTIONS)}"}
        messages = [*([{"role": "system", "content": system}] if system else []), user]
        model = self._base if tenant is None else f"{self._base}:tenant{tenant}"
        options = {"max_tokens": ANSWER_TOKENS, "temperature": 0, "stream": True, "ignore_eos": True}
        return {"model": model, "messages": messages} | options

    async def _measure_first_tokens(self, client: httpx.AsyncClient, bodies: Sequence[Body]) -> list[float]:
        return [await self._send(client, body | {"max_tokens": 1}) for body in bodies]

    async def _measure_throughput(self, client: httpx.AsyncClient, bodies: Sequence[Body]) -> float:
        waiting = iter(bodies)

        async def send_all() -> None:
            for body in waiting:
                await self._send(client, body)

        start = time.perf_counter()
        await asyncio.gather(*(send_all() for _ in range(CLIENTS)))
        return len(bodies) * ANSWER_TOKENS / (time.perf_counter() - start)

    async def _send(self, client: httpx.AsyncClient, body: Body) -> float:
        """Stream an answer, and return the time to its first token in seconds."""
        start, first = time.perf_counter(), None
        async with client.stream("POST", f"{self._url}/v1/chat/completions", json=body) as response:
            if not response.is_success:
                raise RuntimeError(f"{response.status_code}: {(await response.aread()).decode()[:300]}")
            async for line in response.aiter_lines():
                if first is None and '"content":"' in line.replace('": "', '":"') and not line.endswith("[DONE]"):
                    first = time.perf_counter() - start
        if first is None:
            raise RuntimeError("the stream has no token")
        return first

    async def _read_metric(self, client: httpx.AsyncClient, name: str) -> float:
        text = (await client.get(f"{self._url}/metrics")).text
        values = [float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name)]
        return statistics.fmean(values) if values else float("nan")


if __name__ == "__main__":
    main()
