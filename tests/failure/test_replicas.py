"""Two replicas under load: versions change everywhere at once, without a failed answer or one of the wrong version."""

import asyncio
import time
from collections import Counter
from collections.abc import Generator
from contextlib import asynccontextmanager

import httpx
import openai
import pytest

from tests.support.chat_client import BASE
from tests.support.factories import QUESTIONS, TOKENS, make_prefix, reference
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
IN_FLIGHT, LOOKING, LIVE_SECONDS = 50, 4, 5.0


@pytest.fixture(scope="module")
def versions(frozen, base, tmp_path_factory):
    """Three versions of a prefix, the first one champion, the last one damaged; what the good ones answer, by transformers."""
    folder = tmp_path_factory.mktemp("moved")
    run = runs.start_run("test", "align", folder)
    made = [make_prefix(frozen, base, NAME, 1, "system", seed) for seed in (11, 12, 13)]
    registered = [
        registry.register_version(prefixes.save_prefix(each, folder / str(n)), run.run_id) for n, each in enumerate(made)
    ]
    promote_version(registered[0], "test")
    run.finish("FINISHED")
    damaged = [p for p in settings.get_home().rglob(prefixes.FILE) if made[2].card.digest in (p.parent / FILE).read_text()]
    assert damaged
    for path in damaged:
        path.write_bytes(path.read_bytes()[:-4] + b"bad!")
    tokenizer = build_renderer(base, 8).tokenizer
    answers = {}
    for question in QUESTIONS:
        ids = [
            reference(frozen, base, Conversation([{"role": "user", "content": question}], prefix), TOKENS)
            for prefix in made[:2]
        ]
        if ids[0] != ids[1]:
            answers |= {(n, question): tokenizer.decode(each, skip_special_tokens=True) for n, each in enumerate(ids, 1)}
    assert len(answers) >= 6, "versions must answer differently, or their answers would prove nothing"
    return answers


@pytest.fixture(scope="module")
def url(versions) -> Generator[str]:
    engine = EngineConfig(num_slots=8, dtype="fp32", max_model_len=256, cpu_kv_cache_gib=1)
    with serving(ServeConfig(port=ports.find_free_ports()[0], num_replicas=2, engine=engine)) as url:
        yield url


class Load:
    """Answers that came, as (when it was sent, version, question, text); a request that fails is an error of the test."""

    def __init__(self, client, questions):
        self.client = client
        self.questions = questions
        self.answers = []
        self.looks = []
        self.ended = False

    async def ask(self, number):
        while not self.ended:
            question = self.questions[number % len(self.questions)]
            sent, version, text = await self._asked(question, TOKENS)
            self.answers.append((sent, version, question, text))

    async def look(self):
        """Short requests, so that it is known when versions change, and not only whether."""
        while not self.ended:
            self.looks.append((await self._asked("Hi", 1))[:2])

    async def _asked(self, question, tokens):
        sent, asked = time.monotonic(), [{"role": "user", "content": question}]
        reply = await self.client.chat.completions.create(
            model=f"{BASE}:{NAME}", messages=asked, max_tokens=tokens, temperature=0
        )
        return sent, int(reply.model.rpartition("@")[2]), reply.choices[0].message.content

    async def until(self, right):
        """Wait for a state of the answers."""
        async with asyncio.timeout(60):
            while not right():
                await asyncio.sleep(0.02)


@asynccontextmanager
async def load(url, versions):
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=120, max_retries=0) as client:
        running = Load(client, sorted({question for _, question in versions}))
        tasks = [asyncio.create_task(running.ask(number)) for number in range(IN_FLIGHT)]
        tasks += [asyncio.create_task(running.look()) for _ in range(LOOKING)]
        await running.until(lambda: len(running.answers) >= IN_FLIGHT)
        yield running
        running.ended = True
        await asyncio.gather(*tasks)


async def moved(running, change, version):
    """Make a change under load; how long after it the last request was sent that another version answered."""
    began = time.monotonic()
    await asyncio.to_thread(change)
    done = time.monotonic()
    await running.until(lambda: sum(s > done + LIVE_SECONDS / 2 and v == version for s, v, *_ in running.answers) >= IN_FLIGHT)
    late = [sent for sent, v, *_ in [*running.answers, *running.looks] if sent > began and v != version]
    return max(late, default=began) - done


def test_promotion_and_rollback_are_live_everywhere_without_a_wrong_answer(url, base, versions):
    async def run():
        async with load(url, versions) as running:
            promoted = await moved(running, lambda: promote_version(registry.find_version(base.name, NAME, "2"), "test"), 2)
            back = await moved(running, lambda: rollback_version(base.name, NAME), 1)
        return promoted, back, running.answers

    promoted, back, answers = asyncio.run(run())
    print(f"live on both replicas after {promoted:.2f} s, and back after {back:.2f} s; {len(answers)} answers")
    assert promoted < LIVE_SECONDS
    assert back < LIVE_SECONDS
    assert Counter(version for _, version, *_ in answers).keys() == {1, 2}
    wrong = [(version, question, text) for _, version, question, text in answers if text != versions[version, question]]
    assert not wrong


def test_a_version_that_is_damaged_is_refused_by_all_and_named(url, base, versions, capsys, monkeypatch):
    registered = registry.find_version(base.name, NAME, "3")

    async def run():
        async with load(url, versions) as running:
            await asyncio.to_thread(promote_version, registered, "test")
            since = time.monotonic()
            await running.until(lambda: sum(sent > since + LIVE_SECONDS for sent, *_ in running.answers) >= IN_FLIGHT)
        return running.answers

    answers = asyncio.run(run())
    assert {version for _, version, *_ in answers} == {1}
    assert not [text for _, version, question, text in answers if text != versions[version, question]]
    monkeypatch.setenv("COLUMNS", "250")
    assert main(["list", "--live", url]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if NAME in line and "champion" in line]
    assert [cell.strip() for cell in line.strip("│").split("│")][2:4] == ["1", "3"]
    assert "the vectors are not those of the card" in line
    rollback_version(base.name, NAME)


def test_metrics_have_both_replicas(url):
    with httpx.Client(base_url=url, timeout=60) as client:
        deadline = time.monotonic() + 30
        while True:
            text = client.get("/metrics").text
            replicas = {line.split('replica="')[1].split('"')[0] for line in text.splitlines() if 'replica="' in line}
            if len(replicas) == 2 and text.count("trimtab_requests_total{") >= 2:
                return
            assert time.monotonic() < deadline, replicas
            client.post("/v1/completions", json={"model": BASE, "prompt": "x", "max_tokens": 1})
