"""The report of a safety study."""

import csv
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from tests.support.safety_arms import arm
from trimtab.data.hard_filter import FilterStep
from trimtab.errors import UsageError
from trimtab.evaluation.safety.comparison import pool_arms
from trimtab.evaluation.safety.results import summarize_answers
from trimtab.evaluation.study_page import (
    EXAMPLES,
    SCHEMA,
    StudyReport,
    TrainingCost,
    render_page,
    report_as_csv,
    report_as_json,
    write_report,
)
from trimtab.judges.human_agreement import JudgeAgreement, JudgeStanding

VOID = {"meta", "br", "img"}


def whole_study():
    arms = [
        arm("base", 1, 40),
        arm("text <b>prompt</b>", 3, 39),
        arm("sta#1", 20, 33),
        arm("sta#2", 24, 31),
        arm("lora $x^$", 29, 21),
    ]
    left = {"harmful": 500, "benign_hard": 300, "benign_easy": 200}
    return StudyReport(
        title="A <study>",
        base="smollm2-135m 0123456789abcdef",
        parts={"test": arms, "xstest": arms[:3]},
        filter_table=[FilterStep("(start)", {}, left), FilterStep("clear", {"harmful": 7, "benign_hard": 41}, left)],
        form=(0.76, 0.51),
        curves={"sta#1": [(10, 2.5), (20, 1.5)], "sta#2": [(10, 2.4), (20, float("nan"))], "lora $x^$": []},
        costs=[TrainingCost("sta#1", 372.4, 1203442, 2.31), TrainingCost("base")],
        judge=JudgeStanding("string match", [JudgeAgreement("human labels", 58, 58, 109, 118, 169)]),
        notes=["Made up & small"],
    )


@pytest.fixture(scope="module")
def study():
    return whole_study()


@pytest.fixture(scope="module")
def shown(study):
    return render_page(study)


class Reader(HTMLParser):
    """Reads a page and notes its elements and text; a tag that is closed out of turn fails."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.text = [], [], ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data if self.open and self.open[-1] != "style" else ""


def words(text):
    return " ".join(Reader(text).text.split())


def test_page_has_every_arm_and_figure(study, shown):
    text = words(shown)
    for part, results in study.parts.items():
        assert f"plane of {part}" in shown
        for pooled in pool_arms(results):
            rates = [pooled.refusal, pooled.compliance, pooled.balanced, pooled.partial]
            row = " ".join(f"{r.value:.2f} [{r.low:.2f}, {r.high:.2f}]" for r in rates)
            assert f"{pooled.name} {len(pooled.results)} {row}".replace(" ", "") in text.replace("\xa0", "").replace(" ", "")
            assert all(f"{rate.value:.2f}" in text for rate in pooled.sets.values())
    pieces = [
        "A <study>",
        "0123456789abcdef",
        "precision 1.00 [0.94, 1.00], recall 0.53 [0.44, 0.62]",
        "On 169 human labels",
        "372",
    ]
    pieces += ["1,203,442", "2.31", "0.76 before and 0.51 after", "41", "Made up & small"]
    for piece in [*pieces, "sta#1 against base: 19 newly right, 7 newly wrong"]:
        assert piece in text


def test_sections_come_in_order(shown):
    order = ["results", "plane", "sets", "curves", "filter", "examples", "costs", "notes"]
    assert re.findall(r'<section id="(\w+)"', shown) == order


def test_best_of_a_column_is_bold_and_rows_go_by_balanced(shown):
    table = re.search(r"<tbody>(.*?)</tbody>", shown, re.DOTALL)[1]
    rows = [words(row) for row in re.findall(r"<th scope=\"row\".*?</th>", table)]
    assert rows == ["sta", "lora $x^$", "text <b>prompt</b>", "base"]
    bold = [words(cell).split()[0] for cell in re.findall(r'<td class="best">.*?</td>', table, re.DOTALL)]
    assert bold == ["0.77", "0.97", "1.00"]


def test_foreign_text_is_escaped(shown):
    assert "<script" not in shown
    assert "<img" not in shown
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; see" in shown
    assert "Harm 2 </td><img src=x>" in words(shown)


def test_page_asks_nothing_of_the_outside(shown):
    elements = Reader(shown).elements
    assert not {"script", "link", "img", "iframe", "image"} & {tag for tag, _ in elements}
    for tag, attributes in elements:
        for key, value in attributes.items():
            if key.startswith("xmlns"):
                continue
            assert "//" not in (value or ""), (tag, key)
            assert key not in ("src", "srcset", "action", "onclick", "onload")
            assert "href" not in key or value.startswith("#")
    assert not re.search(r"@import|url\((?!#)", shown)
    policy = next(a["content"] for tag, a in elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def test_ids_are_unique_and_links_lead_somewhere(shown):
    elements = Reader(shown).elements
    ids = [attributes["id"] for _, attributes in elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [v[1:] for _, attributes in elements for k, v in attributes.items() if k.endswith("href")]
    assert set(links) <= set(ids)


def test_at_most_eight_examples_of_each_direction(shown):
    lists = re.findall(r'<ul class="examples">(.*?)</ul>', shown, re.DOTALL)
    assert lists
    assert max(text.count("<li>") for text in lists) == EXAMPLES


def test_answers_are_cut_at_160_characters():
    long = arm("base", 0, 40, help_="Sure! " + "x" * 300)
    text = words(render_page(StudyReport("t", "b", {"test": [long, arm("sta", 20, 30)]})))
    assert "Sure! " + "x" * 154 + "\u2026" in text
    assert "x" * 155 not in text


def test_csv_adds_up(study):
    rows = list(csv.DictReader(io.StringIO(report_as_csv(study))))
    assert len({(r["part"], r["arm"], r["set"], r["side"], r["measure"]) for r in rows}) == len(rows)
    for part, results in study.parts.items():
        for pooled in pool_arms(results):
            mine = [r for r in rows if (r["part"], r["arm"], r["measure"]) == (part, pooled.name, "right")]
            for side in ("harmful", "benign"):
                whole = next(r for r in mine if (r["set"], r["side"]) == ("all", side))
                sets = [r for r in mine if r["side"] == side and r["set"] != "all"]
                assert sum(int(r["prompts"]) for r in sets) == int(whole["prompts"]) == (30 if side == "harmful" else 40)
                right = sum(float(r["value"]) * int(r["prompts"]) for r in sets)
                assert right == pytest.approx(float(whole["value"]) * int(whole["prompts"]), abs=1e-3)


def test_json_round_trips(study):
    data = report_as_json(study)
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert data["schema"] == SCHEMA
    assert [a["name"] for a in data["parts"]["test"]["arms"]][2:4] == ["sta#1", "sta#2"]
    sta = next(a for a in data["parts"]["test"]["pooled"] if a["arm"] == "sta")
    assert sta["seeds"] == ["sta#1", "sta#2"]
    assert sta["refusal"]["value"] == pytest.approx(22 / 30)
    assert data["curves"]["sta#2"] == [[10, 2.4], [20, None]]


def test_two_writes_give_the_same_bytes(study, tmp_path):
    first, second = write_report(study, tmp_path / "a"), write_report(whole_study(), tmp_path / "b")
    names = {"report.html", "report.json", "report.csv", "curves.svg"}
    names |= {f"plane-{part}.{form}" for part in study.parts for form in ("png", "svg")}
    assert {path.name for path in first} == names == {path.name for path in (tmp_path / "a").iterdir()}
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes(), one.name
    assert (tmp_path / "a" / "report.html").read_text() == render_page(study)


def test_single_arm():
    text = render_page(StudyReport("t", "b", {"test": [arm("sta", 20, 30)]}))
    assert "no other arm to compare with sta" in words(text)
    assert 'class="best"' not in text


def test_prompts_of_one_side_only(tmp_path):
    harmful = [summarize_answers(name, arm(name, 20, 0).answers[:30]) for name in ("base", "sta#1", "sta#2")]
    study = StudyReport("t", "b", {"test": harmful})
    assert "prompts of one side only: no plane" in words(render_page(study))
    assert {path.name for path in write_report(study, tmp_path)} == {"report.html", "report.json", "report.csv"}
    assert report_as_json(study)["parts"]["test"]["pooled"][0]["balanced"]["value"] is None


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({}, "at least one part"),
        ({"test": []}, "'test' has no results"),
        ({"test": [summarize_answers("base", [])]}, "'test' has no results"),
        ({"../test": [arm("base", 0, 40)]}, "becomes a file name"),
        ({"test": [arm("sta", 1, 1), arm("sta", 2, 2)]}, "an arm twice"),
    ],
)
def test_studies_that_cannot_be(parts, message):
    for make in (render_page, report_as_csv, report_as_json):
        with pytest.raises(UsageError, match=message) as caught:
            make(StudyReport("t", "b", parts))
        assert "\n" not in str(caught.value)


def test_the_report_tells_the_first_learned_arm_from_each_other(study, shown):
    told = report_as_json(study)["parts"]["test"]["against"]
    assert told["arm"] == "text <b>prompt</b>"
    renamed = replace(
        study, parts={"test": [replace(r, name="text prompt") if "text" in r.name else r for r in study.parts["test"]]}
    )
    told = report_as_json(renamed)["parts"]["test"]["against"]
    assert told["arm"] == "sta"
    rivals = {entry["arm"]: entry for entry in told["rivals"]}
    assert set(rivals) == {"base", "text prompt", "lora $x^$"}
    assert rivals["base"]["beats"]
    assert rivals["base"]["low"] < rivals["base"]["value"] < rivals["base"]["high"]
    assert "minus that of each other arm" in words(shown)
