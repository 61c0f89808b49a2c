"""Answers that someone else wrote, in the layouts of labelled sets."""

import json

import pytest
from trimtab.jobs.asked import planned
from trimtab.jobs.collect_config import CollectConfig

from trimtab.data.given import read_given
from trimtab.errors import UsageError


def written(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ({"given": " Paris. ", "truthful": True}, [("Paris.", True)]),
        ({"given": "Rome", "truthful": "no"}, [("Rome", False)]),
        ({"given": "Rome", "truthful": 0.0}, [("Rome", False)]),
        ({"given": "Rome"}, [("Rome", None)]),
        ({"given": "", "truthful": False}, [("", False)]),
        ({"right": "Paris; on the Seine", "wrong": "Rome"}, [("Paris; on the Seine", True), ("Rome", False)]),
        ({"right": ["Paris", "Lutetia"], "wrong": []}, [("Paris", True), ("Lutetia", True)]),
        ({"wrong": ["Rome"]}, [("Rome", False)]),
    ],
)
def test_layouts(tmp_path, row, wanted):
    found = read_given(written(tmp_path / "g.jsonl", [{"question": "The capital of France?", **row}]))
    assert [(given.text, given.truthful) for given in found] == wanted
    assert {given.question.question for given in found} == {"The capital of France?"}


def test_names_context_group_and_a_separator(tmp_path):
    row = {"Question": "Which?", "Good": "a; b;", "knowledge": "Once.", "entity": "FR"}
    columns = {"question": "Question", "right": "Good", "context": "knowledge", "group": "entity"}
    found = read_given(written(tmp_path / "g.jsonl", [row]), columns, ";")
    assert [given.text for given in found] == ["a", "b"]
    assert found[0].question.prompt.messages[-1]["content"] == "Once.\n\nWhich?"
    assert found[0].question.prompt.group == "FR"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"question": "Which?", "answer": "a"},
            "has no column 'given'; it has question, answer: name yours with --columns.given",
        ),
        ({"question": " ", "given": "a"}, "row 1: the question is empty"),
        ({"question": "Which?", "given": "a", "truthful": "perhaps"}, "row 1: truthful is 'perhaps'"),
        ({"question": "Which?", "given": {"a": 1}}, "row 1: a given answer must be text, not dict"),
    ],
)
def test_what_cannot_be_read_is_told_by_its_row(tmp_path, row, said):
    with pytest.raises(UsageError, match=said):
        read_given(written(tmp_path / "g.jsonl", [row]))


def test_right_and_wrong_answers_to_a_question_stay_together(tmp_path):
    file = written(tmp_path / "g.jsonl", [{"question": "Which?", "right": "a", "wrong": ["b", "c", "c"]}])
    config = CollectConfig(questions=file, out=str(tmp_path / "out"), given=True)
    asked = planned(config)
    assert [(a.request.given, a.truthful) for a in asked] == [("a", True), ("b", False), ("c", False)]
    assert len({a.question.prompt.group for a in asked}) == 1
    assert len({a.key for a in asked}) == 3
