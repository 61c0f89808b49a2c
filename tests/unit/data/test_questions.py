"""Reading questions and neutral texts, in the layouts of common sets, and the project's own."""

import csv
import json
import sys
from types import SimpleNamespace

import pytest

from trimtab.data.questions import Question, read_questions
from trimtab.data.texts import ASK, read_texts
from trimtab.errors import NotFoundError, UsageError
from trimtab.text.normalization import normalize_answer


def written(path, rows):
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
def test_layouts_of_answers(tmp_path, row, answers, kind):
    (found,) = read_questions(written(tmp_path / "q.jsonl", [{"question": " Which? ", **row}]))
    assert found == Question("Which?", answers, "q", kind)


def test_every_format_reads_the_same(tmp_path):
    rows = [
        {"question": "Capital, of France?", "answers": "Paris;Lutetia"},
        {"question": "Two and two?", "answers": "x\n#### 4"},
    ]
    written(tmp_path / "a.jsonl", rows)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    with (tmp_path / "a.csv").open("w", newline="") as file:
        file.write("# a comment\n")
        csv.DictWriter(file, ["question", "answers"]).writerows([{"question": "question", "answers": "answers"}, *rows])
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for form in ("jsonl", "json", "csv", "parquet"):
        found = read_questions(str(tmp_path / f"a.{form}"))
        assert [(q.answers, q.kind) for q in found] == [(("Paris", "Lutetia"), None), (("4",), "numeric")], form


def test_other_column_names_and_a_context(tmp_path):
    row = {"Question": "Who?", "Correct Answers": "Ada; Ada Lovelace", "knowledge": "Ada wrote it.", "source": "made up"}
    columns = {"question": "Question", "answers": "Correct Answers", "context": "knowledge"}
    (found,) = read_questions(written(tmp_path / "q.jsonl", [row]), columns)
    assert (found.answers, found.source) == (("Ada", "Ada Lovelace"), "made up")
    assert found.prompt.messages == [{"role": "user", "content": "Ada wrote it.\n\nWho?"}]


BAD = {
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


@pytest.mark.parametrize("name", BAD)
def test_bad_question_files_end_in_one_line(tmp_path, name):
    content, expected = BAD[name]
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UsageError) as caught:
        read_questions(str(tmp_path / name))
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_names_that_are_not_known():
    with pytest.raises(NotFoundError, match="there are: trimtab:countries"):
        read_questions("trimtab:nope")
    with pytest.raises(NotFoundError, match="there are: trimtab:neutral"):
        read_texts("trimtab:nope")
    with pytest.raises(UsageError, match="columns may rename question, answers"):
        read_questions("trimtab:countries", {"prompt": "x"})


def test_a_hub_dataset_may_have_a_config_and_a_split(monkeypatch):
    asked = []

    def load_dataset(*names, split):
        asked.append((*names, split))
        return [{"question": "2 + 2?", "answer": "4\n#### 4"}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert read_questions("openai/gsm8k/main:test")[0].answers == ("4",)
    assert read_questions("org/name")[0].kind == "numeric"
    assert asked == [("openai/gsm8k", "main", "test"), ("org/name", "train")]
    with pytest.raises(UsageError, match="there is no file nothing"):
        read_questions("nothing")


def test_countries_have_answers_that_their_questions_do_not_give_away():
    found = read_questions("trimtab:countries")
    by_question = {q.question: q for q in found}
    assert len(by_question) == len(found) > 400
    assert {q.source for q in found} == {"capitals", "currencies", "continents"}
    assert all(q.kind == "contains" and q.answers for q in found)
    for q in found:
        asked = f" {normalize_answer(q.question)} "
        assert not any(f" {normalize_answer(a)} " in asked for a in q.answers), q.question
    capital = next(q for q in found if "capital" in q.question and "South Africa" in q.question)
    assert set(capital.answers) == {"Pretoria", "Cape Town", "Bloemfontein"}


def test_texts_with_and_without_prompts(tmp_path):
    rows = [{"text": " Once. "}, {"text": ""}, {"text": "Twice.", "prompt": "How often?", "source": "own"}]
    first, second = read_texts(written(tmp_path / "t.jsonl", rows))
    assert (first.prompt, first.target, first.source) == (ASK, "Once.", "t")
    assert (second.prompt, second.target, second.source) == ("How often?", "Twice.", "own")
    other = written(tmp_path / "o.jsonl", [{"response": "So it is.", "instruction": "Tell me."}])
    (third,) = read_texts(other, {"text": "response", "prompt": "instruction"})
    assert (third.prompt, third.target) == ("Tell me.", "So it is.")
    for bad, expected in (
        (rows[1:2], "all texts are empty"),
        ([{"text": 3}], "row 1: text and prompt"),
        ([{"a": 1}], "no column 'text'"),
    ):
        with pytest.raises(UsageError, match=expected):
            read_texts(written(tmp_path / "bad.jsonl", bad))


def test_neutral_texts_are_short_and_varied():
    found = read_texts("trimtab:neutral")
    assert len(found) == len({t.prompt for t in found}) == len({t.target for t in found}) == 60
    assert all(40 <= len(t.target.split()) <= 120 for t in found)
