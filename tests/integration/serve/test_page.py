"""The page at `/`, in a real browser."""

import httpx
import pytest

from tests.support import browser
from tests.support.chat_client import BASE
from tests.support.factories import QUESTIONS

needs_browser = pytest.mark.skipif(browser.found() is None, reason="no Chromium on this machine")
BUSY = "document.body.dataset.busy === 'true'"
IDLE = "document.body.dataset.busy === 'false'"


@pytest.fixture(scope="module")
def tab(url):
    with browser.opened(url) as tab:
        tab.until("document.querySelector('[data-side=left]').options.length > 3")
        yield tab


def answer(side):
    return f"document.querySelector('[data-answer={side}]')"


def note(side):
    return f"document.querySelector('[data-note={side}]').textContent"


def put(tab, **values):
    for name, value in values.items():
        tab.run(f"document.getElementById({name!r}).value = {value!r}")


def ask(tab):
    tab.run("document.getElementById('prompt').focus()")
    tab.press("Enter", 13, modifiers=2)
    tab.until(f"{BUSY} || {answer('left')}.textContent")
    tab.until(IDLE)


def test_the_page_asks_nothing_of_the_outside(url):
    page = httpx.get(f"{url}/", timeout=30)
    assert page.status_code == 200
    assert "default-src 'self'" in page.headers["content-security-policy"]
    assert page.headers["x-content-type-options"] == "nosniff"
    for name in ("", "page.css", "page.js"):
        text = httpx.get(f"{url}/{name}", timeout=30).text
        assert "http://" not in text
        assert "https://" not in text
    assert httpx.get(f"{url}/page.json", timeout=30).json() == {"runs": None}
    assert httpx.head(f"{url}/page.css", timeout=30).text == ""


@needs_browser
def test_two_answers_stream_with_their_risk(tab, client):
    put(tab, prompt=QUESTIONS[1], tokens=24)
    tab.run("document.querySelector('[data-side=right]').value = 'smollm2-135m:two'")
    ask(tab)
    said = client.chat.completions.create(
        model=BASE, messages=[{"role": "user", "content": QUESTIONS[1]}], max_tokens=24, temperature=0
    )
    assert tab.run(f"{answer('left')}.textContent") == said.choices[0].message.content
    assert tab.run(f"{answer('right')}.textContent") != tab.run(f"{answer('left')}.textContent")
    parts = tab.run(f"[...{answer('left')}.children].map((t) => [t.style.getPropertyValue('--part'), t.title])")
    assert len(parts) > 4
    assert all(0 <= float(part) <= 1 for part, _ in parts)
    assert all(float(title.removeprefix("risk so far ")) == pytest.approx(float(part), abs=0.006) for part, title in parts)
    colours = tab.run(f"[...{answer('left')}.children].map((t) => getComputedStyle(t).backgroundColor)")
    assert len(set(colours)) > 2
    assert "truth@1" in tab.run(note("left"))
    assert f"{BASE}:two@1" in tab.run(note("right"))
    assert "fitted without a prefix" in tab.run(note("right"))
    assert tab.run("performance.getEntriesByType('resource').every((e) => e.name.startsWith(location.origin))")
    assert tab.failures == []


@needs_browser
def test_a_risky_answer_is_withheld_or_not_looked_at(tab):
    put(tab, policy="refuse", detector="truth@champion")
    ask(tab)
    texts = {tab.run(f"{answer(side)}.textContent") for side in ("left", "right")}
    flagged = [", flagged" in tab.run(note(side)) for side in ("left", "right")]
    withheld = "I am not sure enough of my answer to give it."
    assert (withheld in texts) == any(flagged)
    put(tab, policy="annotate", detector="off")
    ask(tab)
    assert "not checked: the request disabled detection" in tab.run(note("left"))
    assert tab.run(f"{answer('left')}.children[0].style.getPropertyValue('--part')") == ""
    put(tab, detector="")


@needs_browser
def test_what_goes_wrong_is_said(tab):
    put(tab, tokens=2000)
    ask(tab)
    assert tab.run(f"{answer('left')}.className") == "failed"
    assert "token" in tab.run(f"{answer('left')}.textContent")
    put(tab, tokens=24)
    ask(tab)
    assert tab.run(f"{answer('left')}.className") == ""


@needs_browser
def test_a_long_answer_can_be_stopped(tab):
    put(tab, prompt=QUESTIONS[4], tokens=400)
    tab.run("document.getElementById('send').click()")
    tab.until(f"{answer('left')}.children.length > 2")
    tab.press("Escape", 27)
    assert tab.run(IDLE)
    length = tab.run(f"{answer('left')}.textContent.length")
    tab.run("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    assert tab.run(f"{answer('left')}.textContent.length") == length
    put(tab, tokens=24)


@needs_browser
def test_a_phone_has_the_columns_one_below_the_other(tab):
    tab.width(380)
    tops = tab.run("[...document.querySelectorAll('section')].map((s) => s.getBoundingClientRect().top)")
    assert tops[1] > tops[0]
    assert tab.run("document.documentElement.scrollWidth") <= 380
    tab.width(1200)
    tops = tab.run("[...document.querySelectorAll('section')].map((s) => s.getBoundingClientRect().top)")
    assert tops[0] == tops[1]
