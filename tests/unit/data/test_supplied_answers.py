"""Supplied answers: layouts of labeled data sets, and their plan and labels."""

import json

import pytest

from trimtab.data.supplied_answers import read_supplied_answers
from trimtab.errors import UsageError
from trimtab.generation_types import Answer
from trimtab.jobs.collect.config import CollectConfig
from trimtab.jobs.collect.plan import drop_overlong, label_answers, load_plan
from trimtab.model.chat_template import build_renderer


def write_rows(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("row", "expected"),
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
def test_reads_answer_layouts(tmp_path, row, expected):
    answers = read_supplied_answers(write_rows(tmp_path / "g.jsonl", [{"question": "The capital of France?", **row}]))
    assert [(answer.text, answer.truthful) for answer in answers] == expected
    assert {answer.question.question for answer in answers} == {"The capital of France?"}


def test_reads_renamed_columns_and_separator(tmp_path):
    row = {"Question": "Which?", "Good": "a; b;", "knowledge": "Once.", "entity": "FR"}
    columns = {"question": "Question", "correct_answers": "Good", "context": "knowledge", "group": "entity"}
    answers = read_supplied_answers(write_rows(tmp_path / "g.jsonl", [row]), columns, ";")
    assert [answer.text for answer in answers] == ["a", "b"]
    assert answers[0].question.prompt.messages[-1]["content"] == "Once.\n\nWhich?"
    assert answers[0].question.prompt.group == "FR"


@pytest.mark.parametrize(
    ("row", "message"),
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
def test_rejects_unreadable_row(tmp_path, row, message):
    with pytest.raises(UsageError, match=message):
        read_supplied_answers(write_rows(tmp_path / "g.jsonl", [row]))


def test_answers_to_one_question_share_a_group(tmp_path):
    file = write_rows(
        tmp_path / "g.jsonl", [{"question": "Which?", "correct_answers": "a", "incorrect_answers": ["b", "c", "c"]}]
    )
    config = CollectConfig(questions=file, out=str(tmp_path / "out"), read_answers=True)
    plan = load_plan(config)
    assert [(planned.request.supplied_answer, planned.truthful) for planned in plan] == [
        ("a", True),
        ("b", False),
        ("c", False),
    ]
    assert len({planned.question.prompt.group for planned in plan}) == 1
    assert len({planned.key for planned in plan}) == 3


def test_overlong_rows_are_dropped(tmp_path, base):
    rows = [{"question": "Which?", "answer": "a"}, {"question": "Which? " * 400, "answer": "a"}]
    file = write_rows(tmp_path / "g.jsonl", rows)
    renderer = build_renderer(base, 8)
    for p_true in (False, True):
        config = CollectConfig(questions=file, out="out", read_answers=True, max_model_len=512, p_true=p_true)
        assert [planned.question.question for planned in drop_overlong(load_plan(config), config, renderer, None)] == ["Which?"]
    longer = CollectConfig(questions=file, out="out", read_answers=True, max_model_len=2048)
    assert len(drop_overlong(load_plan(longer), longer, renderer, None)) == 2


def test_truncated_given_answer_has_no_label(tmp_path):
    config = CollectConfig(
        questions=write_rows(tmp_path / "g.jsonl", [{"question": "Which?", "answer": "a b", "truthful": True}]),
        out="o",
        read_answers=True,
    )
    (planned,) = load_plan(config)
    assert label_answers([(planned, Answer("a b", (1, 2), "stop", 9))], config.judge)[0][0] is True
    assert label_answers([(planned, Answer("a b", (1,), "length", 9))], config.judge)[0][0] is None


def test_answer_cut_before_max_tokens_is_not_labeled_wrong(tmp_path):
    config = CollectConfig(
        questions=write_rows(tmp_path / "q.jsonl", [{"question": "Which?", "answers": ["Paris"]}]), out="o", max_tokens=8
    )
    (planned,) = load_plan(config)
    answers = [
        Answer("It is", (1, 2), "length", 9),
        Answer("It is Paris", (1, 2, 3), "length", 9),
        Answer("It is so", tuple(range(8)), "length", 9),
    ]
    assert [label for label, _ in label_answers([(planned, answer) for answer in answers], config.judge)] == [None, True, False]


def test_numeric_kind_requires_numbers(tmp_path):
    file = write_rows(tmp_path / "q.jsonl", [{"question": "How many?", "answers": ["a few"]}])
    with pytest.raises(UsageError, match="holds no number"):
        load_plan(CollectConfig(questions=file, out="o", kind="numeric"))
