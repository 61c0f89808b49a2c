"""Utility metrics: accuracy, perplexity and KL divergence of arms, and their reports."""

import csv
import io
import json
from math import exp, log

import pytest
import torch

from trimtab.data.prompt import Prompt
from trimtab.data.questions import Question
from trimtab.errors import UsageError
from trimtab.evaluation.safety.results import JudgedAnswer, summarize_answers
from trimtab.evaluation.study_page import StudyReport, write_report
from trimtab.evaluation.utility.metrics import MeasuredArm, compute_metrics, mark_answers
from trimtab.evaluation.utility.report import build_tables, get_logged_metrics, metrics_as_csv, metrics_as_json
from trimtab.evaluation.utility.text_scoring import TextScore
from trimtab.stats.bootstrap import bootstrap_mean
from trimtab.stats.intervals import compute_wilson_interval

TOKENS = (10, 20, 30, 40)


def make_arm(name, right, extra=0.0, kl=0.0, abstained=0):
    """Make an arm that answers the first `right` of ten questions right, abstains on the last `abstained`, and has `extra` nats
    per token more than 2."""
    answers = []
    for i in range(10):
        answer = f"It is {i}." if i < right else "I don't know." if i >= 10 - abstained else "It is red."
        answers.append(mark_answers(Question(f"Number {i}?", (str(i),), "odd" if i % 2 else "even"), answer))
    return MeasuredArm(name, answers, [TextScore(tokens, tokens * (2.0 + extra), tokens * kl) for tokens in TOKENS])


def test_metrics_relative_to_base_arm():
    base, sta = compute_metrics([make_arm("base", 8), make_arm("sta", 6, extra=0.5, kl=0.3, abstained=2)])
    assert base.answering.accuracy == compute_wilson_interval(8, 10)
    assert (base.answering.change.value, base.answering.change.low, base.answering.change.high) == (0, 0, 0)
    assert sta.answering.accuracy == compute_wilson_interval(6, 10)
    assert sta.answering.change.value == pytest.approx(-0.2)
    assert sta.answering.change.low < -0.2 < sta.answering.change.high <= 0
    assert sta.answering.abstained == compute_wilson_interval(2, 10)
    assert {key: rate.value for key, rate in sta.answering.sets.items()} == {"even": 0.6, "odd": 0.6}
    assert base.reads.perplexity.value == pytest.approx(exp(2))
    assert (base.reads.factor.value, base.reads.kl.value) == (1, 0)
    assert sta.reads.perplexity.value == pytest.approx(exp(2.5))
    assert sta.reads.factor.value == pytest.approx(exp(0.5))
    assert sta.reads.kl.value == pytest.approx(0.3)
    assert sta.reads.kl.count == 4


def test_perplexity_weighs_by_tokens():
    texts = [TextScore(1, log(2), 0.0), TextScore(9, 9 * log(8), 0.9)]
    (base,) = compute_metrics([MeasuredArm("base", readings=texts)])
    assert base.reads.perplexity.value == pytest.approx(exp((log(2) + 9 * log(8)) / 10))
    assert base.reads.kl.value == pytest.approx(0.09)
    assert base.answering is None


def test_pools_seeds():
    arms = [make_arm("base", 8), make_arm("sta#0", 5, 0.2), make_arm("sta#1", 9, 0.4)]
    base, sta = compute_metrics(arms)
    assert (base.seeds, sta.arm, sta.seeds) == (1, "sta", 2)
    assert sta.answering.accuracy.value == pytest.approx(0.7)
    assert sta.answering.accuracy.low < compute_wilson_interval(7, 10).low + 1e-6
    assert sta.answering.change.value == pytest.approx(-0.1)
    assert sta.reads.factor.value == pytest.approx(exp(0.3))
    assert sta.reads.factor.low == pytest.approx(exp(0.2))
    assert sta.reads.factor.high == pytest.approx(exp(0.4))


def test_partly_right_answer_counts_as_fraction():
    answers = [
        mark_answers(Question("Who?", ("New York City",), "q", "f1"), answer) for answer in ("New York City", "York", "Rome")
    ]
    (base,) = compute_metrics([MeasuredArm("base", answers)])
    assert base.answering.accuracy == compute_wilson_interval(1.5, 3)


def test_bootstrap_interval_has_theoretical_width():
    """For n numbers with standard deviation s, the interval extends about 1.96 s / sqrt(n) on both sides of the mean."""
    values = torch.randn(1, 400, generator=torch.Generator().manual_seed(1)) * 3 + 5
    interval = bootstrap_mean(values)
    half = 1.96 * values.std().item() / 20
    assert interval.value == pytest.approx(values.mean().item())
    assert interval.value - interval.low == pytest.approx(half, rel=0.1)
    assert interval.high - interval.value == pytest.approx(half, rel=0.1)
    assert bootstrap_mean(values) == interval


def test_one_text_has_no_interval():
    (table,) = build_tables([MeasuredArm("base", readings=[TextScore(5, 10.0, 0.0)])], "t")
    assert [list(column.cells) for column in table.columns] == [["base"], ["7.39"], ["1.000"], ["0.0000"]]
    assert metrics_as_csv({"s": [MeasuredArm("base", readings=[TextScore(5, 10.0, 0.0)])]}).splitlines()[1].endswith(",,,1")


def test_rejects_arms_that_are_not_comparable():
    with pytest.raises(UsageError, match="against the arm 'base', which is missing"):
        compute_metrics([make_arm("sta", 5)])
    with pytest.raises(UsageError, match="sta was measured on other questions or texts than base"):
        compute_metrics([make_arm("base", 5), MeasuredArm("sta", make_arm("sta", 5).answers[:9])])


def make_suites():
    return {"facts": [make_arm("base", 8), make_arm("<b>sta</b>#0", 6, 0.5, 0.3), make_arm("<b>sta</b>#1", 6, 0.5, 0.3)]}


def test_metrics_as_json():
    arms = make_suites()["facts"]
    data = json.loads(json.dumps(metrics_as_json(arms), allow_nan=False))
    assert [pooled["arm"] for pooled in data["pooled"]] == ["base", "<b>sta</b>"]
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
    assert "arms" not in metrics_as_json(arms, answers=False)


def test_metrics_as_csv():
    rows = list(csv.DictReader(io.StringIO(metrics_as_csv(make_suites()))))
    assert len(rows) == 2 * (6 + 2)
    (kl,) = [row for row in rows if (row["arm"], row["measure"]) == ("<b>sta</b>", "kl")]
    assert (kl["suite"], kl["seeds"], float(kl["value"]), kl["count"]) == ("facts", "2", pytest.approx(0.3), "4")


def test_logged_metric_names_have_only_allowed_characters():
    logged = get_logged_metrics(make_suites())
    assert logged["utility/facts/base/accuracy"] == 0.8
    assert logged["utility/facts/-b-sta-/b-/kl"] == pytest.approx(0.3)


def test_study_page_shows_every_arm_and_suite(tmp_path):
    refused = JudgedAnswer(Prompt("Steal", "harmful", "t", "t"), "No.", "refusal")
    helped = JudgedAnswer(Prompt("Bake", "benign_easy", "t", "t"), "Flour.", "compliance")
    study = StudyReport("t", "b", {"test": [summarize_answers("base", [refused, helped])]}, utility=make_suites())
    written = {path.name: path for path in write_report(study, tmp_path)}
    page = " ".join(written["report.html"].read_text().split())
    for text in (
        '<section id="utility">',
        "&lt;b&gt;sta&lt;/b&gt;",
        "<b>0.80</b>",
        "<b>-0.20</b>",
        "<b>1.649</b>",
        "<b>0.3000</b>",
    ):
        assert text in page
    assert "<b>sta</b>" not in page
    assert "10 questions, 4 texts." in page
    assert written["utility.csv"].read_text() == metrics_as_csv(make_suites())
    assert set(json.loads(written["report.json"].read_text())["utility"]) == {"facts"}
    assert "utility" not in {path.stem for path in write_report(StudyReport("t", "b", study.parts), tmp_path / "plain")}
