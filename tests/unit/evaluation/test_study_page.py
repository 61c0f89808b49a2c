"""Report of a safety study: page, JSON, CSV and figures."""

import csv
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from tests.support.safety_arms import make_arm_results
from trimtab.data.hard_filter import FilterStep
from trimtab.errors import UsageError
from trimtab.evaluation.safety.comparison import pool_arms
from trimtab.evaluation.safety.results import MEASURES, summarize_answers
from trimtab.evaluation.study_page import (
    EXAMPLES,
    SCHEMA,
    SelectedStep,
    StudyReport,
    TrainingCost,
    render_page,
    report_as_csv,
    report_as_json,
    write_report,
)
from trimtab.judges.human_agreement import JudgeAgreement, JudgeStanding

VOID_ELEMENTS = {"meta", "br", "img"}


def make_study():
    arms = [
        make_arm_results("base", 1, 40),
        make_arm_results("text <b>prompt</b>", 3, 39),
        make_arm_results("sta#1", 20, 33),
        make_arm_results("sta#2", 24, 31),
        make_arm_results("lora $x^$", 29, 21),
    ]
    remaining = {"harmful": 500, "benign_hard": 300, "benign_easy": 200}
    return StudyReport(
        title="A <study>",
        base="smollm2-135m 0123456789abcdef",
        parts={"test": arms, "xstest": arms[:3]},
        filter_table=[FilterStep("(start)", {}, remaining), FilterStep("clear", {"harmful": 7, "benign_hard": 41}, remaining)],
        form=(0.76, 0.51),
        curves={"sta#1": [(10, 2.5), (20, 1.5)], "sta#2": [(10, 2.4), (20, float("nan"))], "lora $x^$": []},
        costs=[TrainingCost("sta#1", 372.4, 1203442, 2.31), TrainingCost("base")],
        judge=JudgeStanding("string match", [JudgeAgreement("human labels", 58, 58, 109, 118, 169)]),
        notes=["Made up & small"],
        selected=[SelectedStep("sta#1", 20, 0.6123, 1.5), SelectedStep("lora $x^$", 40)],
    )


@pytest.fixture(scope="module")
def study():
    return make_study()


@pytest.fixture(scope="module")
def study_html(study):
    return render_page(study)


class PageParser(HTMLParser):
    """Parser that collects elements and text of a page and fails at tags that are not properly nested."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.text = [], [], ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID_ELEMENTS:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data if self.open and self.open[-1] != "style" else ""


def extract_text(html):
    return " ".join(PageParser(html).text.split())


def test_page_has_every_arm_and_rate(study, study_html):
    text = extract_text(study_html)
    for part, results in study.parts.items():
        assert f"plane of {part}" in study_html
        for pooled in pool_arms(results):
            rates = [getattr(pooled, measure) for measure in MEASURES]
            row = " ".join(f"{rate.value:.2f} [{rate.low:.2f}, {rate.high:.2f}]" for rate in rates)
            assert f"{pooled.name} {len(pooled.results)} {row}".replace(" ", "") in text.replace("\xa0", "").replace(" ", "")
            assert all(f"{rate.value:.2f}" in text for rate in pooled.sets.values())
    snippets = [
        "A <study>",
        "0123456789abcdef",
        "precision 1.00 [0.94, 1.00], recall 0.53 [0.44, 0.62]",
        "On 169 human labels",
        "372",
    ]
    snippets += ["1,203,442", "2.31", "0.76 before and 0.51 after", "41", "Made up & small"]
    snippets += ["sta#1200.6121.500", "lora $x^$40\u2013\u2013"]
    for snippet in [*snippets, "sta#1 against base: 19 newly right, 7 newly wrong"]:
        assert snippet in text


def test_order_of_sections(study_html):
    order = ["results", "plane", "sets", "curves", "filter", "examples", "costs", "notes"]
    assert re.findall(r'<section id="(\w+)"', study_html) == order


def test_table_is_sorted_by_balanced_rate_with_best_in_bold(study_html):
    table = re.search(r"<tbody>(.*?)</tbody>", study_html, re.DOTALL)[1]
    rows = [extract_text(row) for row in re.findall(r"<th scope=\"row\".*?</th>", table)]
    assert rows == ["sta", "lora $x^$", "text <b>prompt</b>", "base"]
    bold = [extract_text(cell).split()[0] for cell in re.findall(r'<td class="best">.*?</td>', table, re.DOTALL)]
    assert bold == ["0.77", "0.97", "0.03", "1.00"]


def test_escapes_untrusted_text(study_html):
    assert "<script" not in study_html
    assert "<img" not in study_html
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; see" in study_html
    assert "Harm 2 </td><img src=x>" in extract_text(study_html)


def test_page_loads_no_external_resources(study_html):
    elements = PageParser(study_html).elements
    assert not {"script", "link", "img", "iframe", "image"} & {tag for tag, _ in elements}
    for tag, attributes in elements:
        for key, value in attributes.items():
            if key.startswith("xmlns"):
                continue
            assert "//" not in (value or ""), (tag, key)
            assert key not in ("src", "srcset", "action", "onclick", "onload")
            assert "href" not in key or value.startswith("#")
    assert not re.search(r"@import|url\((?!#)", study_html)
    policy = next(
        attributes["content"] for _, attributes in elements if attributes.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def test_ids_are_unique_and_links_resolve(study_html):
    elements = PageParser(study_html).elements
    ids = [attributes["id"] for _, attributes in elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [value[1:] for _, attributes in elements for key, value in attributes.items() if key.endswith("href")]
    assert set(links) <= set(ids)


def test_limits_examples_of_each_direction(study_html):
    lists = re.findall(r'<ul class="examples">(.*?)</ul>', study_html, re.DOTALL)
    assert lists
    assert max(text.count("<li>") for text in lists) == EXAMPLES


def test_truncates_answers_at_160_characters():
    long = make_arm_results("base", 0, 40, help_text="Sure! " + "x" * 300)
    text = extract_text(render_page(StudyReport("t", "b", {"test": [long, make_arm_results("sta", 20, 30)]})))
    assert "Sure! " + "x" * 154 + "\u2026" in text
    assert "x" * 155 not in text


def test_csv_counts_equal_results(study):
    rows = list(csv.DictReader(io.StringIO(report_as_csv(study))))
    assert len({(row["part"], row["arm"], row["set"], row["side"], row["measure"]) for row in rows}) == len(rows)
    for part, results in study.parts.items():
        for pooled in pool_arms(results):
            arm_rows = [row for row in rows if (row["part"], row["arm"], row["measure"]) == (part, pooled.name, "right")]
            for side in ("harmful", "benign"):
                total = next(row for row in arm_rows if (row["set"], row["side"]) == ("all", side))
                sets = [row for row in arm_rows if row["side"] == side and row["set"] != "all"]
                assert sum(int(row["prompts"]) for row in sets) == int(total["prompts"]) == (30 if side == "harmful" else 40)
                right = sum(float(row["value"]) * int(row["prompts"]) for row in sets)
                assert right == pytest.approx(float(total["value"]) * int(total["prompts"]), abs=1e-3)


def test_report_as_json(study):
    data = report_as_json(study)
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert data["schema"] == SCHEMA
    assert [arm["name"] for arm in data["parts"]["test"]["arms"]][2:4] == ["sta#1", "sta#2"]
    sta = next(pooled for pooled in data["parts"]["test"]["pooled"] if pooled["arm"] == "sta")
    assert sta["seeds"] == ["sta#1", "sta#2"]
    assert sta["refusal"]["value"] == pytest.approx(22 / 30)
    assert data["curves"]["sta#2"] == [[10, 2.4], [20, None]]


def test_report_files_are_reproducible(study, tmp_path):
    first, second = write_report(study, tmp_path / "a"), write_report(make_study(), tmp_path / "b")
    names = {"report.html", "report.json", "report.csv", "curves.svg"}
    names |= {f"plane-{part}.{suffix}" for part in study.parts for suffix in ("png", "svg")}
    assert {path.name for path in first} == names == {path.name for path in (tmp_path / "a").iterdir()}
    for path, other in zip(first, second, strict=True):
        assert path.read_bytes() == other.read_bytes(), path.name
    assert (tmp_path / "a" / "report.html").read_text() == render_page(study)


def test_page_of_single_arm():
    html = render_page(StudyReport("t", "b", {"test": [make_arm_results("sta", 20, 30)]}))
    assert "no other arm to compare with sta" in extract_text(html)
    assert 'class="best"' not in html


def test_report_of_harmful_prompts_only(tmp_path):
    harmful = [summarize_answers(name, make_arm_results(name, 20, 0).answers[:30]) for name in ("base", "sta#1", "sta#2")]
    study = StudyReport("t", "b", {"test": harmful})
    assert "prompts of one side only: no plane" in extract_text(render_page(study))
    assert {path.name for path in write_report(study, tmp_path)} == {"report.html", "report.json", "report.csv"}
    assert report_as_json(study)["parts"]["test"]["pooled"][0]["balanced"]["value"] is None


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({}, "at least one part"),
        ({"test": []}, "'test' has no results"),
        ({"test": [summarize_answers("base", [])]}, "'test' has no results"),
        ({"../test": [make_arm_results("base", 0, 40)]}, "becomes a file name"),
        ({"test": [make_arm_results("sta", 1, 1), make_arm_results("sta", 2, 2)]}, "an arm twice"),
    ],
)
@pytest.mark.parametrize("render", [render_page, report_as_csv, report_as_json])
def test_rejects_invalid_study(render, parts, message):
    with pytest.raises(UsageError, match=message) as error:
        render(StudyReport("t", "b", parts))
    assert "\n" not in str(error.value)


def test_report_compares_first_learned_arm_with_the_others(study, study_html):
    comparison = report_as_json(study)["parts"]["test"]["against"]
    assert comparison["arm"] == "text <b>prompt</b>"
    results = [replace(arm, name="text prompt") if "text" in arm.name else arm for arm in study.parts["test"]]
    comparison = report_as_json(replace(study, parts={"test": results}))["parts"]["test"]["against"]
    assert comparison["arm"] == "sta"
    rivals = {entry["arm"]: entry for entry in comparison["rivals"]}
    assert set(rivals) == {"base", "text prompt", "lora $x^$"}
    assert rivals["base"]["beats"]
    assert rivals["base"]["low"] < rivals["base"]["value"] < rivals["base"]["high"]
    assert "minus that of each other arm" in extract_text(study_html)
