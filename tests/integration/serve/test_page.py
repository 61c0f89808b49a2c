"""The page at `/`, in a browser."""

import httpx
import pytest

from tests.support import browser
from tests.support.chat_client import BASE
from tests.support.factories import QUESTIONS
from trimtab.detection.live_labels import read_labels

needs_browser = pytest.mark.skipif(browser.find_browser() is None, reason="no Chromium on this machine")
BUSY = "document.body.dataset.busy === 'true'"
IDLE = "document.body.dataset.busy === 'false'"


@pytest.fixture(scope="module")
def tab(url):
    with browser.open_tab(url) as tab:
        tab.wait_until("document.querySelector('[data-side=left]').options.length > 3")
        yield tab


def select_answer(side):
    return f"document.querySelector('[data-answer={side}]')"


def select_note(side):
    return f"document.querySelector('[data-note={side}]').textContent"


def set_inputs(tab, **values):
    for name, value in values.items():
        tab.evaluate(f"document.getElementById({name!r}).value = {value!r}")


def send_prompt(tab):
    tab.evaluate("document.getElementById('prompt').focus()")
    tab.press_key("Enter", 13, modifiers=2)
    tab.wait_until(f"{BUSY} || {select_answer('left')}.textContent")
    tab.wait_until(IDLE)


def test_page_loads_no_external_resources(url):
    page = httpx.get(f"{url}/", timeout=30)
    assert page.status_code == 200
    assert "default-src 'self'" in page.headers["content-security-policy"]
    assert page.headers["x-content-type-options"] == "nosniff"
    for name in ("", "page.css", "page.js"):
        text = httpx.get(f"{url}/{name}", timeout=30).text
        assert "http://" not in text
        assert "https://" not in text
    assert httpx.get(f"{url}/page.json", timeout=30).json() == {"runs": None, "feedback": True}
    assert httpx.head(f"{url}/page.css", timeout=30).text == ""


@needs_browser
def test_two_answers_stream_with_risks(tab, client):
    set_inputs(tab, prompt=QUESTIONS[1], tokens=24)
    tab.evaluate("document.querySelector('[data-side=right]').value = 'smollm2-135m:two'")
    send_prompt(tab)
    response = client.chat.completions.create(
        model=BASE, messages=[{"role": "user", "content": QUESTIONS[1]}], max_tokens=24, temperature=0
    )
    assert tab.evaluate(f"{select_answer('left')}.textContent") == response.choices[0].message.content
    assert tab.evaluate(f"{select_answer('right')}.textContent") != tab.evaluate(f"{select_answer('left')}.textContent")
    parts = tab.evaluate(f"[...{select_answer('left')}.children].map((t) => [t.style.getPropertyValue('--part'), t.title])")
    assert len(parts) > 4
    assert all(0 <= float(part) <= 1 for part, _ in parts)
    assert all(float(title.removeprefix("risk so far ")) == pytest.approx(float(part), abs=0.006) for part, title in parts)
    colors = tab.evaluate(f"[...{select_answer('left')}.children].map((t) => getComputedStyle(t).backgroundColor)")
    assert len(set(colors)) > 2
    assert "truth@1" in tab.evaluate(select_note("left"))
    assert f"{BASE}:two@1" in tab.evaluate(select_note("right"))
    assert "fitted without a prefix" in tab.evaluate(select_note("right"))
    assert tab.evaluate("performance.getEntriesByType('resource').every((e) => e.name.startsWith(location.origin))")
    assert tab.failures == []


@needs_browser
def test_policy_withholds_and_off_disables_detection(tab):
    set_inputs(tab, policy="refuse", detector="truth@champion")
    send_prompt(tab)
    texts = {tab.evaluate(f"{select_answer(side)}.textContent") for side in ("left", "right")}
    flagged = [", flagged" in tab.evaluate(select_note(side)) for side in ("left", "right")]
    withheld = "I am not sure enough of my answer to give it."
    assert (withheld in texts) == any(flagged)
    set_inputs(tab, policy="annotate", detector="off")
    send_prompt(tab)
    assert "not checked: the request disabled detection" in tab.evaluate(select_note("left"))
    assert tab.evaluate(f"{select_answer('left')}.children[0].style.getPropertyValue('--part')") == ""
    set_inputs(tab, detector="")


@needs_browser
def test_guard_refuses_a_prompt(tab, client):
    """The verdicts of the page are those of the API; a flagged prompt is refused on both sides."""
    set_inputs(tab, guard="guard@champion: refuse")
    refused = 0
    for question in QUESTIONS[:4]:
        set_inputs(tab, prompt=question)
        send_prompt(tab)
        (result,) = client.moderations.create(input=question).results
        for side in ("left", "right"):
            note = tab.evaluate(select_note(side))
            assert f"prompt {result.category_scores.model_dump()['guard']:.2f}" in note
            assert "guard@1" in note
            assert (", flagged, refuse" in note) == result.flagged
            assert (tab.evaluate(f"{select_answer(side)}.textContent") == "I cannot help with that request.") == result.flagged
        refused += result.flagged
    assert 0 < refused < 4
    set_inputs(tab, guard="")


@needs_browser
def test_thumbs_label_an_answer(tab, signals_folder):
    set_inputs(tab, prompt=QUESTIONS[0], tokens=8)
    send_prompt(tab)
    tab.wait_until("!document.querySelector('[data-thumbs=left]').hidden")
    request_id = tab.evaluate("document.querySelector('[data-thumbs=left]').dataset.id")
    tab.evaluate("document.querySelector('[data-thumbs=left] [data-correct=false]').click()")
    tab.wait_until("document.querySelector('[data-thumbs=left] [role=status]').textContent")
    assert tab.evaluate("document.querySelector('[data-thumbs=left] [role=status]').textContent") == "stored"
    labels = [label for label in read_labels(signals_folder) if label.id == request_id]
    assert [label.correct for label in labels] == [False]


@needs_browser
def test_page_shows_why_a_detector_cannot_stop_answers(tab):
    """The detectors of this server were trained without unfinished answers."""
    set_inputs(tab, policy="stop", detector="truth@champion")
    send_prompt(tab)
    assert "has no threshold to stop answers" in tab.evaluate(f"{select_answer('left')}.textContent")
    set_inputs(tab, policy="annotate", detector="")


@needs_browser
def test_shows_errors(tab):
    set_inputs(tab, tokens=2000)
    send_prompt(tab)
    assert tab.evaluate(f"{select_answer('left')}.className") == "failed"
    assert "token" in tab.evaluate(f"{select_answer('left')}.textContent")
    set_inputs(tab, tokens=24)
    send_prompt(tab)
    assert tab.evaluate(f"{select_answer('left')}.className") == ""


@needs_browser
def test_escape_stops_an_answer(tab):
    set_inputs(tab, prompt=QUESTIONS[4], tokens=400)
    tab.evaluate("document.getElementById('send').click()")
    tab.wait_until(f"{select_answer('left')}.children.length > 2")
    tab.press_key("Escape", 27)
    assert tab.evaluate(IDLE)
    length = tab.evaluate(f"{select_answer('left')}.textContent.length")
    tab.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    assert tab.evaluate(f"{select_answer('left')}.textContent.length") == length
    set_inputs(tab, tokens=24)


@needs_browser
def test_columns_stack_on_narrow_screens(tab):
    tab.set_width(380)
    tops = tab.evaluate("[...document.querySelectorAll('section')].map((s) => s.getBoundingClientRect().top)")
    assert tops[1] > tops[0]
    assert tab.evaluate("document.documentElement.scrollWidth") <= 380
    tab.set_width(1200)
    tops = tab.evaluate("[...document.querySelectorAll('section')].map((s) => s.getBoundingClientRect().top)")
    assert tops[0] == tops[1]
