"""Two replicas under load: version changes without failed or wrong answers."""

import asyncio
import time
from collections import Counter
from collections.abc import Generator
from contextlib import asynccontextmanager

import httpx
import openai
import pytest

from tests.support.chat_client import BASE
from tests.support.factories import QUESTIONS, TOKENS, generate_reference, make_prefix
from trimtab import settings
from trimtab.artifacts import prefix as prefixes
from trimtab.artifacts.card import FILE
from trimtab.cli.main import main
from trimtab.engine.config import EngineConfig
from trimtab.generation_types import Conversation
from trimtab.model.chat_template import build_renderer
from trimtab.serve.config import ServeConfig
from trimtab.serve.server import serving
from trimtab.tracking import registry, runs
from trimtab.tracking.promotions import promote_version, rollback_version
from trimtab.util import ports

NAME = "moved"
CONCURRENT_REQUESTS, CONCURRENT_PROBES, LIVE_SECONDS = 50, 4, 5.0


@pytest.fixture(scope="module")
def version_answers(frozen, base, tmp_path_factory):
    """Answers of transformers by version and question. Of the three registered versions, the first is champion and the last is
    damaged."""
    folder = tmp_path_factory.mktemp("moved")
    run = runs.start_run("test", "align", folder)
    version_prefixes = [make_prefix(frozen, base, NAME, 1, "system", seed) for seed in (11, 12, 13)]
    registered_versions = [
        registry.register_version(prefixes.save_prefix(prefix, folder / str(number)), run.run_id)
        for number, prefix in enumerate(version_prefixes)
    ]
    promote_version(registered_versions[0], "test")
    run.finish("FINISHED")
    damaged = [
        path
        for path in settings.get_home().rglob(prefixes.FILE)
        if version_prefixes[2].card.digest in (path.parent / FILE).read_text()
    ]
    assert damaged
    for path in damaged:
        path.write_bytes(path.read_bytes()[:-4] + b"bad!")
    tokenizer = build_renderer(base, 8).tokenizer
    answers = {}
    for question in QUESTIONS:
        ids = [
            generate_reference(frozen, base, Conversation([{"role": "user", "content": question}], prefix), TOKENS)
            for prefix in version_prefixes[:2]
        ]
        if ids[0] != ids[1]:
            answers |= {
                (number, question): tokenizer.decode(token_ids, skip_special_tokens=True)
                for number, token_ids in enumerate(ids, 1)
            }
    assert len(answers) >= 6, "versions must answer differently, or their answers would prove nothing"
    return answers


@pytest.fixture(scope="module")
def replicated_server_url(version_answers) -> Generator[str]:
    engine = EngineConfig(num_slots=8, dtype="fp32", max_model_len=256, cpu_kv_cache_gib=1)
    with serving(ServeConfig(port=ports.find_free_ports()[0], num_replicas=2, engine=engine)) as url:
        yield url


class Load:
    """Concurrent requests. An answer is (time sent, version, question, text); a failed request fails the test."""

    def __init__(self, client, questions):
        self.client = client
        self.questions = questions
        self.answers = []
        self.probes = []
        self.stopped = False

    async def send_questions(self, number):
        while not self.stopped:
            question = self.questions[number % len(self.questions)]
            sent, version, text = await self._send(question, TOKENS)
            self.answers.append((sent, version, question, text))

    async def send_probes(self):
        """Send short requests, which show when a version changes."""
        while not self.stopped:
            self.probes.append((await self._send("Hi", 1))[:2])

    async def _send(self, question, tokens):
        sent, messages = time.monotonic(), [{"role": "user", "content": question}]
        response = await self.client.chat.completions.create(
            model=f"{BASE}:{NAME}", messages=messages, max_tokens=tokens, temperature=0
        )
        return sent, int(response.model.rpartition("@")[2]), response.choices[0].message.content

    async def wait_until(self, condition):
        """Wait until a condition is true."""
        async with asyncio.timeout(60):
            while not condition():
                await asyncio.sleep(0.02)


@asynccontextmanager
async def run_load(url, version_answers):
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=120, max_retries=0) as client:
        load = Load(client, sorted({question for _, question in version_answers}))
        tasks = [asyncio.create_task(load.send_questions(number)) for number in range(CONCURRENT_REQUESTS)]
        tasks += [asyncio.create_task(load.send_probes()) for _ in range(CONCURRENT_PROBES)]
        await load.wait_until(lambda: len(load.answers) >= CONCURRENT_REQUESTS)
        yield load
        load.stopped = True
        await asyncio.gather(*tasks)


async def measure_change(load, change, version):
    """Make a change under load; return the seconds from its end to the last request that another version answered."""
    began = time.monotonic()
    await asyncio.to_thread(change)
    done = time.monotonic()

    def count_new() -> int:
        return sum(sent > done + LIVE_SECONDS / 2 and answered_by == version for sent, answered_by, *_ in load.answers)

    await load.wait_until(lambda: count_new() >= CONCURRENT_REQUESTS)
    late = [sent for sent, answered_by, *_ in [*load.answers, *load.probes] if sent > began and answered_by != version]
    return max(late, default=began) - done


def test_promotion_and_rollback_give_no_wrong_answers(replicated_server_url, base, version_answers):
    async def run():
        async with run_load(replicated_server_url, version_answers) as load:
            promoted = await measure_change(
                load, lambda: promote_version(registry.find_version(base.name, NAME, "2"), "test"), 2
            )
            rolled_back = await measure_change(load, lambda: rollback_version(base.name, NAME), 1)
        return promoted, rolled_back, load.answers

    promoted, rolled_back, answers = asyncio.run(run())
    print(f"live on both replicas after {promoted:.2f} s, and back after {rolled_back:.2f} s; {len(answers)} answers")
    assert promoted < LIVE_SECONDS
    assert rolled_back < LIVE_SECONDS
    assert Counter(version for _, version, *_ in answers).keys() == {1, 2}
    wrong = [(version, question, text) for _, version, question, text in answers if text != version_answers[version, question]]
    assert not wrong


def test_all_replicas_refuse_damaged_version(replicated_server_url, base, version_answers, capsys, monkeypatch):
    damaged = registry.find_version(base.name, NAME, "3")

    async def run():
        async with run_load(replicated_server_url, version_answers) as load:
            await asyncio.to_thread(promote_version, damaged, "test")
            promoted_at = time.monotonic()
            await load.wait_until(
                lambda: sum(sent > promoted_at + LIVE_SECONDS for sent, *_ in load.answers) >= CONCURRENT_REQUESTS
            )
        return load.answers

    answers = asyncio.run(run())
    assert {version for _, version, *_ in answers} == {1}
    assert not [text for _, version, question, text in answers if text != version_answers[version, question]]
    monkeypatch.setenv("COLUMNS", "250")
    assert main(["list", "--live", replicated_server_url]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if NAME in line and "champion" in line]
    assert [cell.strip() for cell in line.strip("│").split("│")][2:4] == ["1", "3"]
    assert "the vectors are not those of the card" in line
    rollback_version(base.name, NAME)


def test_metrics_include_both_replicas(replicated_server_url):
    with httpx.Client(base_url=replicated_server_url, timeout=60) as client:
        deadline = time.monotonic() + 30
        while True:
            text = client.get("/metrics").text
            replicas = {line.split('replica="')[1].split('"')[0] for line in text.splitlines() if 'replica="' in line}
            if len(replicas) == 2 and text.count("trimtab_requests_total{") >= 2:
                return
            assert time.monotonic() < deadline, replicas
            client.post("/v1/completions", json={"model": BASE, "prompt": "x", "max_tokens": 1})
