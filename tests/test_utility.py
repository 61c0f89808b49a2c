"""Utility suites: figures from answers and readings, the report of them, and reading itself against transformers."""

import csv
import io
import json
from math import exp, log

import pytest
import torch

from tests import tiny
from trimtab.artifacts import prefix as prefixes
from trimtab.artifacts.card import Card
from trimtab.cli.main import main
from trimtab.data.prompt import Prompt
from trimtab.data.questions import Question
from trimtab.errors import UsageError
from trimtab.evaluation import study_page
from trimtab.evaluation.safety.results import Arm, Judged, summarise
from trimtab.evaluation.study_page import Study
from trimtab.evaluation.utility import report, text_scoring
from trimtab.evaluation.utility.metrics import Measured, figures, marked
from trimtab.evaluation.utility.text_scoring import Reading
from trimtab.jobs.evaluate import utility as job
from trimtab.jobs.evaluate.arm_cache import Store
from trimtab.jobs.evaluate.config import UtilityConfig, UtilitySuite
from trimtab.model import chat_template
from trimtab.model.frozen_model import FrozenModel
from trimtab.stats.intervals import mean, wilson

TOKENS = (10, 20, 30, 40)


def arm(name, right, extra=0.0, kl=0.0, silent=0):
    """An arm that is right on the first `right` of ten questions, silent on the last `silent`, and reads with `extra` nats."""
    answers = []
    for i in range(10):
        said = f"It is {i}." if i < right else "I don't know." if i >= 10 - silent else "It is red."
        answers.append(marked(Question(f"Number {i}?", (str(i),), "odd" if i % 2 else "even"), said))
    return Measured(name, answers, [Reading(n, n * (2.0 + extra), n * kl) for n in TOKENS])


def test_figures_against_the_base_arm():
    base, sta = figures([arm("base", 8), arm("sta", 6, extra=0.5, kl=0.3, silent=2)])
    assert base.answering.accuracy == wilson(8, 10)
    assert (base.answering.change.value, base.answering.change.low, base.answering.change.high) == (0, 0, 0)
    assert sta.answering.accuracy == wilson(6, 10)
    assert sta.answering.change.value == pytest.approx(-0.2)
    assert sta.answering.change.low < -0.2 < sta.answering.change.high <= 0
    assert sta.answering.abstained == wilson(2, 10)
    assert {key: rate.value for key, rate in sta.answering.sets.items()} == {"even": 0.6, "odd": 0.6}
    assert base.reads.perplexity.value == pytest.approx(exp(2))
    assert (base.reads.factor.value, base.reads.kl.value) == (1, 0)
    assert sta.reads.perplexity.value == pytest.approx(exp(2.5))
    assert sta.reads.factor.value == pytest.approx(exp(0.5))
    assert sta.reads.kl.value == pytest.approx(0.3)
    assert sta.reads.kl.count == 4


def test_perplexity_weighs_by_tokens():
    texts = [Reading(1, log(2), 0.0), Reading(9, 9 * log(8), 0.9)]
    (base,) = figures([Measured("base", readings=texts)])
    assert base.reads.perplexity.value == pytest.approx(exp((log(2) + 9 * log(8)) / 10))
    assert base.reads.kl.value == pytest.approx(0.09)
    assert base.answering is None


def test_seeds_are_pooled():
    measured = [arm("base", 8), arm("sta#0", 5, 0.2), arm("sta#1", 9, 0.4)]
    base, sta = figures(measured)
    assert (base.seeds, sta.arm, sta.seeds) == (1, "sta", 2)
    assert sta.answering.accuracy.value == pytest.approx(0.7)
    assert sta.answering.accuracy.low < wilson(7, 10).low + 1e-6
    assert sta.answering.change.value == pytest.approx(-0.1)
    assert sta.reads.factor.value == pytest.approx(exp(0.3))
    assert sta.reads.factor.low == pytest.approx(exp(0.2))
    assert sta.reads.factor.high == pytest.approx(exp(0.4))


def test_partly_right_answers_count_in_part():
    answers = [marked(Question("Who?", ("New York City",), "q", "f1"), said) for said in ("New York City", "York", "Rome")]
    (base,) = figures([Measured("base", answers)])
    assert base.answering.accuracy == wilson(1.5, 3)


def test_the_bootstrap_is_as_wide_as_theory_says():
    """Of n numbers with standard deviation s, about 1.96 s / sqrt(n) on both sides of the mean."""
    values = torch.randn(1, 400, generator=torch.Generator().manual_seed(1)) * 3 + 5
    found = mean(values)
    half = 1.96 * values.std().item() / 20
    assert found.value == pytest.approx(values.mean().item())
    assert (found.value - found.low, found.high - found.value) == (pytest.approx(half, rel=0.1), pytest.approx(half, rel=0.1))
    assert mean(values) == found


def test_one_text_has_no_interval():
    (shown,) = report.tables([Measured("base", readings=[Reading(5, 10.0, 0.0)])], "t")
    assert [list(column.cells) for column in shown.columns] == [["base"], ["7.39"], ["1.000"], ["0.0000"]]
    assert report.csv({"s": [Measured("base", readings=[Reading(5, 10.0, 0.0)])]}).splitlines()[1].endswith(",,,1")


def test_what_cannot_be_compared():
    with pytest.raises(UsageError, match="against the arm 'base', and there is none"):
        figures([arm("sta", 5)])
    with pytest.raises(UsageError, match="sta was measured on other questions or texts than base"):
        figures([arm("base", 5), Measured("sta", arm("sta", 5).answers[:9])])


def suites():
    return {"facts": [arm("base", 8), arm("<b>sta</b>#0", 6, 0.5, 0.3), arm("<b>sta</b>#1", 6, 0.5, 0.3)]}


def test_report_of_every_kind():
    measured = suites()["facts"]
    data = json.loads(json.dumps(report.as_json(measured), allow_nan=False))
    assert [a["arm"] for a in data["pooled"]] == ["base", "<b>sta</b>"]
    assert data["pooled"][1]["accuracy"]["value"] == 0.6
    assert data["arms"][1]["answers"][9] | {"source": "", "wanted": []} == {
        "question": "Number 9?",
        "wanted": [],
        "source": "",
        "answer": "It is red.",
        "score": 0.0,
        "why": "does not hold '9'",
        "abstained": False,
    }
    assert data["arms"][1]["texts"][0] == {"tokens": 10, "nll": 25.0, "kl": 3.0}
    assert "arms" not in report.as_json(measured, answers=False)
    rows = list(csv.DictReader(io.StringIO(report.csv(suites()))))
    assert len(rows) == 2 * (6 + 2)
    (kl,) = [r for r in rows if (r["arm"], r["measure"]) == ("<b>sta</b>", "kl")]
    assert (kl["suite"], kl["seeds"], float(kl["value"]), kl["count"]) == ("facts", "2", pytest.approx(0.3), "4")
    logged = report.logged(suites())
    assert logged["utility/facts/base/accuracy"] == 0.8
    assert logged["utility/facts/-b-sta-/b-/kl"] == pytest.approx(0.3)


def test_the_page_shows_every_arm_and_suite(tmp_path):
    refused = Judged(Prompt("Steal", "harmful", "t", "t"), "No.", "refusal")
    helped = Judged(Prompt("Bake", "benign_easy", "t", "t"), "Flour.", "compliance")
    study = Study("t", "b", {"test": [summarise("base", [refused, helped])]}, utility=suites())
    written = {path.name: path for path in study_page.write(study, tmp_path)}
    shown = " ".join(written["report.html"].read_text().split())
    for piece in (
        '<section id="utility">',
        "&lt;b&gt;sta&lt;/b&gt;",
        "<b>0.80</b>",
        "<b>-0.20</b>",
        "<b>1.649</b>",
        "<b>0.3000</b>",
    ):
        assert piece in shown
    assert "<b>sta</b>" not in shown
    assert "10 questions, 4 texts." in shown
    assert written["utility.csv"].read_text() == report.csv(suites())
    assert set(json.loads(written["report.json"].read_text())["utility"]) == {"facts"}
    assert "utility" not in {path.stem for path in study_page.write(Study("t", "b", study.parts), tmp_path / "plain")}


def by_hand(base, loaded, renderer, text, vectors=None, place="system", system=None):
    """Log-probabilities [T, V] and tokens [T] of a text, from the whole model on embeddings put together here."""
    rows = list(range(renderer.first_row, renderer.first_row + (0 if vectors is None else len(vectors))))
    said = [{"role": "system", "content": system}] if system else []
    before = renderer.prompt([*said, {"role": "user", "content": text.prompt}], place, rows)
    target = renderer.tokenizer.encode(text.target, add_special_tokens=False)
    ids = torch.tensor([*before, *target])
    embedded = loaded.get_input_embeddings()(ids.masked_fill(ids >= renderer.first_row, 0))
    if vectors is not None:
        embedded[ids >= renderer.first_row] = vectors * (base.width**0.5 if base.name.startswith("gemma") else 1.0)
    with torch.no_grad():
        logits = loaded(inputs_embeds=embedded[None]).logits[0]
    return logits[len(before) - 1 : -1].log_softmax(-1), ids[len(before) :]


TEXTS = [
    Prompt("Where?", "benign_easy", "t", "1", target="It is Paris, a city on the river Seine."),
    Prompt("How do I boil an egg?", "benign_easy", "t", "2", target="Put it into hot water."),
    Prompt("So?", "benign_easy", "t", "3", target="Wait for some minutes and think about it."),
]


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_readings_are_those_of_the_whole_model(family, tmp_path):
    base = tiny.make(tiny.FAMILIES[family], tmp_path / family)
    renderer, loaded = chat_template.renderer(base, 4), base.load("fp32")
    place = "user" if family == "gemma2" else "system"
    torch.manual_seed(3)
    prefix = prefixes.make(torch.randn(2, base.width) / 2, Card("prefix", "p", base.name, base.fingerprint, place, 0, 0, ""))
    arms = [Arm("base"), Arm("p", prefix=prefix), *([] if family == "gemma2" else [Arm("text", system="Be brief.")])]
    found = text_scoring.read(FrozenModel(loaded, renderer.first_row), renderer, arms, TEXTS, 64)
    for number, text in enumerate(TEXTS):
        plain, ids = by_hand(base, loaded, renderer, text)
        for one, readings in zip(arms, found, strict=True):
            vectors = one.prefix.vectors if one.prefix else None
            logp, _ = by_hand(base, loaded, renderer, text, vectors, place, one.system)
            nll = -logp.gather(1, ids[:, None]).sum().item()
            kl = (plain.exp() * (plain - logp)).sum().item()
            assert readings[number].tokens == len(ids)
            assert (readings[number].nll, readings[number].kl) == (pytest.approx(nll, rel=1e-3), pytest.approx(kl, abs=2e-3))
            assert (kl > 0.1) is (one.name != "base")


def test_texts_are_cut_and_batches_change_nothing(tmp_path, monkeypatch):
    base = tiny.make(tiny.FAMILIES["llama"], tmp_path / "llama")
    renderer = chat_template.renderer(base, 4)
    frozen = FrozenModel(base.load("fp32"), renderer.first_row)
    told = []
    arms = [Arm("base"), Arm("text", system="Be brief.")]
    together = text_scoring.read(frozen, renderer, arms, TEXTS, 5, lambda done, total: told.append((done, total)))
    assert [r.tokens for r in together[1]] == [5, 5, 5]
    assert told[-1] == (6, 6)
    monkeypatch.setattr(text_scoring, "TEXTS", 1)
    alone = text_scoring.read(frozen, renderer, arms, TEXTS, 5)
    for one, other in zip(together[1], alone[1], strict=True):
        assert (one.nll, one.kl) == (pytest.approx(other.nll, rel=1e-4), pytest.approx(other.kl, rel=1e-2))
    with pytest.raises(UsageError, match="row token"):
        text_scoring.read(frozen, renderer, arms, [Prompt("a", "benign_easy", "t", "t", target="<|trimtab_row_0|>")], 5)


def test_a_suite_is_read_and_checked(tmp_path):
    path = tmp_path / "q.jsonl"
    rows = [{"question": f"{i} + {i}?", "answer": f"so\n#### {2 * i}"} for i in range(30)]
    path.write_text("\n".join(map(json.dumps, rows)))
    suite = job.load(UtilitySuite(questions=str(path), texts="trimtab:neutral", limit=7), "sums")
    assert (len(suite.questions), len(suite.texts), suite.max_tokens) == (7, 7, 320)
    assert {q.kind for q in suite.questions} == {"numeric"}
    more = job.load(UtilitySuite(questions=[str(path), "trimtab:countries"], limit=8, kind="f1", max_tokens=9), "more")
    assert ({q.kind for q in more.questions}, more.max_tokens) == ({"f1"}, 9)
    assert [entry["rows"] for entry in suite.inputs("sums")] == [7, 7]
    path.write_text('{"question": "How many?", "answers": "twelve"}')
    with pytest.raises(UsageError, match="'twelve' holds no number"):
        job.load(UtilitySuite(questions=str(path), kind="numeric"), "sums")
    assert job.load(UtilitySuite(questions=str(path)), "sums").max_tokens == 32
    with pytest.raises(UsageError, match=r"utility sums: columns may rename answers, .*, not goal"):
        job.load(UtilitySuite(questions=str(path), columns={"goal": "x"}), "sums")
    for settings in (UtilitySuite, UtilityConfig):
        with pytest.raises(UsageError, match=r"questions .*texts"):
            settings()
    with pytest.raises(UsageError, match="must not be below 0"):
        UtilitySuite(texts="trimtab:neutral", limit=-1)


def test_answers_and_readings_are_kept_by_all_that_they_depend_on(tmp_path):
    store = Store(tmp_path, "f", TEXTS, 8, "fp32")
    strict = Arm("text", system="Be good.")
    assert store.answers(strict) is None
    store.put_answers(strict, ["a", "b", "c"])
    store.put_readings(strict, [Reading(1, 2.0, 3.0)] * 3)
    assert store.answers(Arm("other name", system="Be good.")) == ["a", "b", "c"]
    assert store.readings(strict) == [Reading(1, 2.0, 3.0)] * 3
    others = [
        Store(tmp_path, "f", TEXTS[:1], 8, "fp32"),
        Store(tmp_path, "f", TEXTS, 9, "fp32"),
        Store(tmp_path, "f", TEXTS, 8, "bf16"),
    ]
    assert all(other.answers(strict) is None for other in others)
    assert store.answers(Arm("base")) is None


@pytest.mark.usefixtures("cluster")
def test_the_command_reads_texts_without_an_engine(tmp_path, capsys):
    base = tiny.make(tiny.FAMILIES["llama"], tmp_path / "llama")
    torch.manual_seed(0)
    card = Card("prefix", "mine", base.name, base.fingerprint, "system", 0, 0, "")
    prefixes.save(prefixes.make(torch.randn(1, base.width), card), tmp_path / "mine")
    out, answers = tmp_path / "out.json", tmp_path / "answers.json"
    given = ["--texts", "trimtab:neutral", "--limit", "4", "--longest", "16", "--prefix", str(tmp_path / "mine")]
    given += ["--base", str(tmp_path / "llama"), "--precision", "fp32", "--answers", str(answers), "--json", str(out)]
    assert main(["evaluate", "utility", *given]) == 0
    pooled = json.loads(out.read_text())["pooled"]
    assert [a["arm"] for a in pooled] == ["base", "text prompt", "mine"]
    assert pooled[0]["kl"]["value"] == 0
    assert pooled[2]["kl"]["value"] > 0.01
    assert [r["tokens"] for r in json.loads(answers.read_text())["arms"][2]["texts"]] == [16] * 4
    shown = capsys.readouterr().out
    assert "times base" in shown
    assert "accuracy" not in shown
    assert "\u2026" not in shown, "the table is as wide as it needs"
    assert main(["evaluate", "utility", *given]) == 0
    assert "texts read" not in capsys.readouterr().out, "nothing is read twice"
