"""Question sets and neutral texts: layouts, errors and the bundled sets."""

import csv
import json
import sys
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trimtab.data.questions import Question, read_questions
from trimtab.data.texts import DEFAULT_REQUEST, read_texts
from trimtab.errors import NotFoundError, UsageError
from trimtab.text.normalization import normalize_answer


def write_rows(path, rows):
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("row", "answers", "kind"),
    [
        ({"answers": ["Paris", "paris", "Lutetia", "Paris", " "]}, ("Paris", "paris", "Lutetia"), None),
        ({"answer": ["one", "one season"]}, ("one", "one season"), None),
        ({"answer": "Add 3 and 4.\n3 + 4 = <<3+4=7>>7\n#### 7"}, ("7",), "numeric"),
        ({"answers": "Paris; Lutetia | the City of Light"}, ("Paris", "Lutetia", "the City of Light"), None),
        ({"answers": '["a; b", "c"]'}, ("a; b", "c"), None),
        ({"answers": "[sic]"}, ("[sic]",), None),
        ({"answers": {"text": ["in Paris", "Paris"], "answer_start": [3, 6]}}, ("in Paris", "Paris"), None),
        ({"answer": {"value": "Paris", "aliases": ["Lutetia"]}}, ("Paris", "Lutetia"), None),
        ({"answers": 42, "kind": "numeric"}, ("42",), "numeric"),
        ({"answer": True}, ("yes",), None),
        ({"answers": [], "kind": "exact"}, (), "exact"),
        ({"answers": {"text": []}}, (), None),
    ],
)
def test_reads_answer_layouts(tmp_path, row, answers, kind):
    (question,) = read_questions(write_rows(tmp_path / "q.jsonl", [{"question": " Which? ", **row}]))
    assert question == Question("Which?", answers, "q", kind)


def test_question_file_formats_are_equivalent(tmp_path):
    rows = [
        {"question": "Capital, of France?", "answers": "Paris;Lutetia"},
        {"question": "Two and two?", "answers": "x\n#### 4"},
    ]
    write_rows(tmp_path / "a.jsonl", rows)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    with (tmp_path / "a.csv").open("w", newline="") as file:
        file.write("# a comment\n")
        csv.DictWriter(file, ["question", "answers"]).writerows([{"question": "question", "answers": "answers"}, *rows])
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for suffix in ("jsonl", "json", "csv", "parquet"):
        questions = read_questions(str(tmp_path / f"a.{suffix}"))
        assert [(q.answers, q.kind) for q in questions] == [(("Paris", "Lutetia"), None), (("4",), "numeric")], suffix


def test_reads_renamed_columns_and_context(tmp_path):
    row = {"Question": "Who?", "Correct Answers": "Ada; Ada Lovelace", "knowledge": "Ada wrote it.", "source": "made up"}
    columns = {"question": "Question", "answers": "Correct Answers", "context": "knowledge"}
    (question,) = read_questions(write_rows(tmp_path / "q.jsonl", [row]), columns)
    assert (question.answers, question.source) == (("Ada", "Ada Lovelace"), "made up")
    assert question.prompt.messages == [{"role": "user", "content": "Ada wrote it.\n\nWho?"}]


INVALID_FILES = {
    "column.csv": ("q,answer\nx,y\n", "has no column 'question'; it has q, answer. Set --columns.question"),
    "answers.csv": ("question,a\nx,y\n", "has no column 'answers'; it has question, a"),
    "blank.csv": ("question,answers\n ,y\n", "row 1: the question is empty"),
    "none.csv": (
        "question,answers\nx,y\nz, ;\n",
        "row 2: the answer is empty. Give an empty list for a question without an answer",
    ),
    "kind.csv": ("question,answers,kind\nx,y,near\n", "row 1: kind 'near' must be one of exact, contains, f1, numeric"),
    "object.jsonl": ('{"question": "x", "answers": {"a": 1}}', "row 1: answers are an object without text or value"),
    "deep.jsonl": ('{"question": "x", "answers": [["a"]]}', "row 1: an answer must be text or a number, not list"),
    "null.jsonl": ('{"question": "x", "answers": null}', "row 1: the answer is empty"),
    "missing.jsonl": (None, "there is no file"),
}


@pytest.mark.parametrize("name", INVALID_FILES)
def test_rejects_invalid_question_file_in_one_line(tmp_path, name):
    content, expected = INVALID_FILES[name]
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UsageError) as error:
        read_questions(str(tmp_path / name))
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_rejects_unknown_sets_and_columns():
    with pytest.raises(NotFoundError, match="there are: trimtab:countries"):
        read_questions("trimtab:nope")
    with pytest.raises(NotFoundError, match="there are: trimtab:neutral"):
        read_texts("trimtab:nope")
    with pytest.raises(UsageError, match="columns may rename question, answers"):
        read_questions("trimtab:countries", {"prompt": "x"})


def test_hub_dataset_accepts_config_and_split(monkeypatch):
    calls = []

    def load_dataset(*names, split):
        calls.append((*names, split))
        return [{"question": "2 + 2?", "answer": "4\n#### 4"}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert read_questions("openai/gsm8k/main:test")[0].answers == ("4",)
    assert read_questions("org/name")[0].kind == "numeric"
    assert calls == [("openai/gsm8k", "main", "test"), ("org/name", "train")]
    with pytest.raises(UsageError, match="there is no file nothing"):
        read_questions("nothing")


def test_country_questions_do_not_contain_their_answers():
    questions = read_questions("trimtab:countries")
    by_question = {q.question: q for q in questions}
    assert len(by_question) == len(questions) > 400
    assert {q.source for q in questions} == {"capitals", "currencies", "continents"}
    assert all(q.kind == "contains" and q.answers for q in questions)
    for q in questions:
        text = f" {normalize_answer(q.question)} "
        assert not any(f" {normalize_answer(a)} " in text for a in q.answers), q.question
    capital = next(q for q in questions if "capital" in q.question and "South Africa" in q.question)
    assert set(capital.answers) == {"Pretoria", "Cape Town", "Bloemfontein"}


def test_reads_texts_with_and_without_prompts(tmp_path):
    rows = [{"text": " Once. "}, {"text": ""}, {"text": "Twice.", "prompt": "How often?", "source": "own"}]
    first, second = read_texts(write_rows(tmp_path / "t.jsonl", rows))
    assert (first.prompt, first.target, first.source) == (DEFAULT_REQUEST, "Once.", "t")
    assert (second.prompt, second.target, second.source) == ("How often?", "Twice.", "own")
    renamed = write_rows(tmp_path / "o.jsonl", [{"response": "So it is.", "instruction": "Tell me."}])
    (third,) = read_texts(renamed, {"text": "response", "prompt": "instruction"})
    assert (third.prompt, third.target) == ("Tell me.", "So it is.")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": ""}, "all texts are empty"),
        ({"text": 3}, "row 1: text and prompt"),
        ({"a": 1}, "no column 'text'"),
    ],
)
def test_rejects_invalid_texts(tmp_path, row, message):
    with pytest.raises(UsageError, match=message):
        read_texts(write_rows(tmp_path / "bad.jsonl", [row]))


def test_neutral_texts_are_short_and_varied():
    texts = read_texts("trimtab:neutral")
    assert len(texts) == len({t.prompt for t in texts}) == len({t.target for t in texts}) == 60
    assert all(40 <= len(t.target.split()) <= 120 for t in texts)
