"""Attacks on a server of two replicas with API keys, and what honest clients observe meanwhile.

python bench/abuse.py [--quick] [--only NAME ...] [--json FILE]

Eight honest clients send chats with a prefix without a pause. Calm and attacked periods alternate; the ratio of their
throughputs has a bootstrap interval over the pairs. Each attack runs in a process of its own, with no key or one key. Two of
the twelve attacks are no requests: a damaged key file, and a second server on the machine while a replica of the first one is
replaced.
"""

import argparse
import asyncio
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import psutil
from peers import servers
from peers.attacks import ATTACKS, HERD
from peers.clients import send_question
from peers.homes import own_home
from peers.keys import add_key
from peers.processes import name_process
from peers.servers import RunningServer, Server

from trimtab.artifacts.prefix import FILE
from trimtab.model.base_model import BaseModel, resolve_base_model
from trimtab.stats.intervals import Interval

CLIENTS, TOKENS, PAIRS, SECONDS = 8, 8, 4, 12.0
QUICK_PAIRS, QUICK_SECONDS = 2, 6.0
OK, GOAL, RECOVERY_SECONDS = 200, 0.9, 60.0
QUESTIONS = [f"Name {number} fruits." for number in range(2, 2 + CLIENTS)]
DAMAGED, SECOND = "damaged key file", "two servers"
WITHOUT_KEY = ("idle connections", "open posts", "path floods")


def main() -> None:
    options = parse_arguments()
    pairs, seconds = (QUICK_PAIRS, QUICK_SECONDS) if options.quick else (PAIRS, SECONDS)
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="abuse-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        own_home(folder / "home")
        base = resolve_base_model(options.base)
        registry, keys = build_registry(base, folder / "registry"), folder / "keys.json"
        honest, attacker = add_key("honest", str(keys)), add_key("attacker", str(keys))
        command = servers.build_trimtab_command(
            base.name, "--num_replicas", "2", "--api_key_file", str(keys), "--registry", str(registry)
        )
        command += ["--engine.num_slots", "16", "--engine.max_model_len", "512"]
        with servers.run_server(Server("abuse", command), {"authorization": f"Bearer {honest}"}) as up:
            bench = AttackBench(up, honest, attacker, f"{base.name}:p0", pairs, seconds)
            for attack in options.only or [*ATTACKS, DAMAGED]:
                if attack != SECOND:
                    lines += bench.measure_attack(attack, keys)
            if not options.only or SECOND in options.only:
                lines += bench.measure_second_server(base.name)
    print(json.dumps(lines, indent=1))
    if options.json:
        Path(options.json).write_text(json.dumps(lines, indent=1) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_PAIRS} pairs of {QUICK_SECONDS:g} s")
    parser.add_argument("--only", nargs="+", choices=[*ATTACKS, DAMAGED, SECOND], help="these attacks")
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--base", default="smollm2-135m")
    return parser.parse_args()


def build_registry(base: BaseModel, folder: Path) -> Path:
    """Make a registry folder with a prefix p0, and the versions of the herd, half of them damaged."""
    servers.save_random_prefixes(base, folder, 1, strength=4.0)
    for number in range(1, len(HERD) + 1):
        version = folder / "herd" / str(number)
        shutil.copytree(folder / "p0" / "1", version)
        if number % 2:
            (version / FILE).write_bytes(b"x" * 100)
    return folder


class AttackBench:
    """Measurement of honest clients during attacks.

    Args:
        up: server under attack.
        honest: API key of the honest clients.
        attacker: API key of the attacker.
        model: model of the honest clients.
        pairs: number of pairs of a calm and an attacked period.
        seconds: duration of a period.
    """

    def __init__(self, up: RunningServer, honest: str, attacker: str, model: str, pairs: int, seconds: float) -> None:
        self._up = up
        self._honest = honest
        self._attacker = attacker
        self._model = model
        self._pairs = pairs
        self._seconds = seconds
        asyncio.run(self._load(seconds))

    def measure_attack(self, attack: str, keys: Path) -> list[dict[str, Any]]:
        """Alternate calm and attacked periods; return the lines of the report."""
        calm, attacked, statuses, recovery = list[float](), list[float](), list[int](), list[float]()
        memory = self._read_memory()
        for _ in range(self._pairs):
            finished, observed = asyncio.run(self._load(self._seconds))
            calm.append(finished / self._seconds)
            with self._run_attack(attack, keys):
                finished, observed = asyncio.run(self._load(self._seconds))
            attacked.append(finished / self._seconds)
            statuses += observed
            recovery.append(self._measure_recovery(calm[-1]))
        ratio = bootstrap_ratio(attacked, calm)
        failed = [status for status in statuses if status != OK]
        met = True if ratio.low > GOAL else False if ratio.high < GOAL else None
        figures = {"low": ratio.low, "high": ratio.high, "calm": float(np.median(calm)), "recovery_seconds": max(recovery)}
        figures |= {"replica_megabytes": [memory, self._read_memory()], "key": attack not in WITHOUT_KEY}
        line = build_line(
            f"{attack}: throughput of honest clients", float(np.median(attacked)), "requests/s", ratio.value, GOAL, met
        )
        print(f"{attack}: {ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}], {len(failed)} failed", flush=True)
        return [
            line | figures,
            build_line(f"{attack}: failed honest requests", len(failed), "requests", None, 0, not failed)
            | {"statuses": failed[:10]},
        ]

    def measure_second_server(self, base: str) -> list[dict[str, Any]]:
        """Start a server without keys, kill a replica of the first one, and count answers of the other server."""
        foreign, checked = 0, 0
        with servers.run_server(Server("second", servers.build_trimtab_command(base, "--engine.num_slots", "4"))) as other:
            victims = [p for p in psutil.Process(self._up.process.pid).children(recursive=True) if _is_engine_replica(p)]
            victims[0].send_signal(signal.SIGKILL)
            deadline = time.monotonic() + RECOVERY_SECONDS
            while time.monotonic() < deadline:
                for url, key, own in ((self._up.url, self._honest, True), (other.url, "none", False)):
                    names = asyncio.run(_list_models(url, key))
                    if names is not None:
                        checked += 1
                        foreign += (f"{base}:p0" in names) != own
        print(f"{SECOND}: {foreign} of {checked} answers came from the other server", flush=True)
        return [
            build_line(f"{SECOND}: answers of the other server", foreign, "answers", None, 0, not foreign)
            | {"checked": checked}
        ]

    @contextmanager
    def _run_attack(self, attack: str, keys: Path) -> Generator[None]:
        if attack == DAMAGED:
            valid = keys.read_text()
            keys.write_text(valid[: len(valid) // 2])
            try:
                yield
            finally:
                keys.write_text(valid)
            return
        key = "none" if attack in WITHOUT_KEY else self._attacker
        script = Path(__file__).parent / "peers" / "attacks.py"
        process = subprocess.Popen([sys.executable, script, attack, self._up.url, key], stderr=subprocess.DEVNULL)
        try:
            yield
        finally:
            process.kill()
            process.wait()

    async def _load(self, seconds: float) -> tuple[int, list[int]]:
        """Send honest requests; return the number of finished ones and all statuses."""
        statuses: list[int] = []
        deadline = time.monotonic() + seconds

        async def run_client(session: aiohttp.ClientSession, text: str) -> None:
            while time.monotonic() < deadline:
                status, _ = await send_question(session, self._up.url, self._model, text, TOKENS)
                statuses.append(status)

        headers, timeout = {"authorization": f"Bearer {self._honest}"}, aiohttp.ClientTimeout(120)
        async with aiohttp.ClientSession(headers=headers, timeout=timeout) as session:
            await asyncio.gather(*(run_client(session, text) for text in QUESTIONS))
        return sum(status == OK for status in statuses), statuses

    def _measure_recovery(self, calm: float) -> float:
        """Return the time after an attack until a second has three quarters of the calm throughput."""
        began = time.monotonic()
        while time.monotonic() - began < RECOVERY_SECONDS:
            started = time.monotonic()
            finished, _ = asyncio.run(self._load(1.0))
            if finished / (time.monotonic() - started) >= 0.75 * calm:
                return started - began
        return RECOVERY_SECONDS

    def _read_memory(self) -> list[int]:
        """Return the unique memory of the replicas in MB."""
        children = psutil.Process(self._up.process.pid).children(recursive=True)
        return [round(p.memory_full_info().uss / 1e6) for p in children if _is_engine_replica(p)]


def bootstrap_ratio(attacked: Sequence[float], calm: Sequence[float], draws: int = 2000) -> Interval:
    """Return the ratio of the sums of paired periods, with a 95 % bootstrap interval over the pairs."""
    a, c = np.array(attacked), np.array(calm)
    chosen = np.random.default_rng(0).integers(0, len(a), (draws, len(a)))
    low, high = np.quantile(a[chosen].sum(1) / c[chosen].sum(1), (0.025, 0.975))
    return Interval(float(a.sum() / c.sum()), float(low), float(high))


def _is_engine_replica(process: psutil.Process) -> bool:
    try:
        return name_process(" ".join(process.cmdline()) or "?") == "replica"
    except psutil.Error:
        return False


async def _list_models(url: str, key: str) -> list[str] | None:
    headers = {} if key == "none" else {"authorization": f"Bearer {key}"}
    try:
        async with aiohttp.ClientSession(headers=headers) as session, session.get(f"{url}/v1/models") as response:
            return [entry["id"] for entry in (await response.json())["data"]] if response.status == OK else None
    except (aiohttp.ClientError, TimeoutError, ValueError):
        return None


def build_line(name: str, value: float, unit: str, ratio: float | None, goal: float | None, met: bool | None) -> dict[str, Any]:
    return {"name": name, "value": value, "unit": unit, "peer": None, "ratio": ratio, "goal": goal, "met": met}


if __name__ == "__main__":
    main()
