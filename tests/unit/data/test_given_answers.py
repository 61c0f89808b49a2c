"""Answers that someone else wrote, in the layouts of labelled sets."""

import json

import pytest

from trimtab.data.given_answers import read_given_answers
from trimtab.errors import UsageError
from trimtab.generation_types import Answer
from trimtab.jobs.collect.config import CollectConfig
from trimtab.jobs.collect.plan import drop_overlong, label_answers, load_plan
from trimtab.model.chat_template import build_renderer


def written(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ({"answer": " Paris. ", "truthful": True}, [("Paris.", True)]),
        ({"answer": "Rome", "truthful": "no"}, [("Rome", False)]),
        ({"answer": "Rome", "truthful": 0.0}, [("Rome", False)]),
        ({"answer": "Rome"}, [("Rome", None)]),
        ({"answer": "", "truthful": False}, [("", False)]),
        ({"correct_answers": "Paris; on it", "incorrect_answers": "Rome"}, [("Paris; on it", True), ("Rome", False)]),
        ({"correct_answers": "Paris", "incorrect_answers": ""}, [("Paris", True)]),
        ({"correct_answers": None, "incorrect_answers": ["Rome", " "]}, [("Rome", False)]),
        ({"correct_answers": ["Paris", "Lutetia"], "incorrect_answers": []}, [("Paris", True), ("Lutetia", True)]),
        ({"incorrect_answers": ["Rome"]}, [("Rome", False)]),
    ],
)
def test_layouts(tmp_path, row, wanted):
    found = read_given_answers(written(tmp_path / "g.jsonl", [{"question": "The capital of France?", **row}]))
    assert [(given.text, given.truthful) for given in found] == wanted
    assert {given.question.question for given in found} == {"The capital of France?"}


def test_names_context_group_and_a_separator(tmp_path):
    row = {"Question": "Which?", "Good": "a; b;", "knowledge": "Once.", "entity": "FR"}
    columns = {"question": "Question", "correct_answers": "Good", "context": "knowledge", "group": "entity"}
    found = read_given_answers(written(tmp_path / "g.jsonl", [row]), columns, ";")
    assert [given.text for given in found] == ["a", "b"]
    assert found[0].question.prompt.messages[-1]["content"] == "Once.\n\nWhich?"
    assert found[0].question.prompt.group == "FR"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"question": "Which?", "text": "a"},
            "has no column 'answer'; it has question, text. Set --columns.answer",
        ),
        ({"question": " ", "answer": "a"}, "row 1: the question is empty"),
        ({"question": "Which?", "answer": "a", "correct_answers": "b"}, "row 1 has both answer and correct_answers"),
        ({"question": "Which?", "answer": "a", "truthful": "perhaps"}, "row 1: truthful is 'perhaps'"),
        ({"question": "Which?", "answer": {"a": 1}}, "row 1: an answer must be one text, not dict"),
        ({"question": "Which?", "answer": None}, "row 1: an answer must be one text, not NoneType"),
        ({"question": "Which?", "answer": ["a", "b"]}, "row 1: an answer must be one text, not list"),
        ({"question": "Which?", "correct_answers": {"a": 1}}, "row 1: an answer must be text, not dict"),
    ],
)
def test_what_cannot_be_read_is_told_by_its_row(tmp_path, row, said):
    with pytest.raises(UsageError, match=said):
        read_given_answers(written(tmp_path / "g.jsonl", [row]))


def test_right_and_wrong_answers_to_a_question_stay_together(tmp_path):
    file = written(tmp_path / "g.jsonl", [{"question": "Which?", "correct_answers": "a", "incorrect_answers": ["b", "c", "c"]}])
    config = CollectConfig(questions=file, out=str(tmp_path / "out"), read_answers=True)
    asked = load_plan(config)
    assert [(a.request.given_answer, a.truthful) for a in asked] == [("a", True), ("b", False), ("c", False)]
    assert len({a.question.prompt.group for a in asked}) == 1
    assert len({a.key for a in asked}) == 3


def test_what_is_longer_than_the_engine_takes_is_left_out(tmp_path, base):
    rows = [{"question": "Which?", "answer": "a"}, {"question": "Which? " * 400, "answer": "a"}]
    file = written(tmp_path / "g.jsonl", rows)
    renderer = build_renderer(base, 8)
    for p_true in (False, True):
        config = CollectConfig(questions=file, out="out", read_answers=True, max_model_len=512, p_true=p_true)
        assert [one.question.question for one in drop_overlong(load_plan(config), config, renderer, None)] == ["Which?"]
    longer = CollectConfig(questions=file, out="out", read_answers=True, max_model_len=2048)
    assert len(drop_overlong(load_plan(longer), longer, renderer, None)) == 2


def test_an_answer_that_was_cut_has_no_label_that_speaks_of_the_whole(tmp_path):
    config = CollectConfig(
        questions=written(tmp_path / "g.jsonl", [{"question": "Which?", "answer": "a b", "truthful": True}]),
        out="o",
        read_answers=True,
    )
    (asked,) = load_plan(config)
    assert label_answers([(asked, Answer("a b", (1, 2), "stop", 9))], config.judge)[0][0] is True
    assert label_answers([(asked, Answer("a b", (1,), "length", 9))], config.judge)[0][0] is None


def test_an_answer_that_the_engine_cut_short_is_not_called_made_up(tmp_path):
    config = CollectConfig(
        questions=written(tmp_path / "q.jsonl", [{"question": "Which?", "answers": ["Paris"]}]), out="o", max_tokens=8
    )
    (asked,) = load_plan(config)
    said = [
        Answer("It is", (1, 2), "length", 9),
        Answer("It is Paris", (1, 2, 3), "length", 9),
        Answer("It is so", tuple(range(8)), "length", 9),
    ]
    assert [label for label, _ in label_answers([(asked, one) for one in said], config.judge)] == [None, True, False]


def test_numbers_are_wanted_where_numbers_are_compared(tmp_path):
    file = written(tmp_path / "q.jsonl", [{"question": "How many?", "answers": ["a few"]}])
    with pytest.raises(UsageError, match="holds no number"):
        load_plan(CollectConfig(questions=file, out="o", kind="numeric"))
