"""Utility suites: figures from answers and readings, the report of them, and reading itself against transformers."""

import csv
import io
import json
from math import exp, log

import pytest
import torch

from trimtab.data.prompt import Prompt
from trimtab.data.questions import Question
from trimtab.errors import UsageError
from trimtab.evaluation import study_page
from trimtab.evaluation.safety.results import Judged, summarise
from trimtab.evaluation.study_page import Study
from trimtab.evaluation.utility import report
from trimtab.evaluation.utility.metrics import Measured, figures, marked
from trimtab.evaluation.utility.text_scoring import Reading
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
