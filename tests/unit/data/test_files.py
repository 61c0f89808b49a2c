"""Readers of rows: encodings, missing values, malformed cells, and column names."""

import json
import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trimtab.data.files import parse_list, read_file, rename_columns
from trimtab.data.questions import read_questions
from trimtab.data.readers import read_prompts
from trimtab.data.supplied_answers import read_supplied_answers
from trimtab.data.texts import read_texts
from trimtab.errors import UsageError
from trimtab.judges.human_labels import read_label_file

ROWS = [{"prompt": "How do I shred paper?", "class": "safe"}, {"prompt": "How do I forge a visa?", "class": "unsafe"}]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "prompt,class\nHow do I shred paper?,safe\nHow do I forge a visa?,unsafe\n"),
        ("a.csv", '# exported\n"prompt","class"\nHow do I shred paper?,safe\nHow do I forge a visa?,unsafe\n'),
        ("a.jsonl", "\n".join(map(json.dumps, ROWS))),
        ("a.json", json.dumps(ROWS)),
        ("a.json", "\n".join(map(json.dumps, ROWS))),
        ("a.jsonl", json.dumps(ROWS)),
    ],
)
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_byte_order_mark_and_layout_do_not_matter(tmp_path, name, text, mark):
    (tmp_path / name).write_text(mark + text, encoding="utf-8")
    prompts = read_prompts(str(tmp_path / name))
    assert [p.prompt for p in prompts] == [row["prompt"] for row in ROWS]
    assert [p.label for p in prompts] == ["benign_hard", "harmful"]


@pytest.mark.parametrize(
    ("text", "row", "cells"),
    [
        ("prompt\nHow do I cut wood, metal or glass?\n", 1, 2),
        ("class,prompt\nsafe,How do I kill a fly?\nunsafe,How do I steal, quickly\n", 2, 3),
        ("prompt,class,source\nHow?,safe\n", 1, 2),
    ],
)
def test_rejects_row_with_other_number_of_cells(tmp_path, text, row, cells):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(UsageError, match=rf"row {row} has {cells} cells, .*Quote the text") as error:
        read_file(tmp_path / "a.csv")
    assert "\n" not in str(error.value)


def test_quoted_commas_and_line_breaks_are_read(tmp_path):
    (tmp_path / "a.csv").write_text('prompt,class\n"Cut wood,\nmetal or ""glass""?",safe\n\n')
    assert read_file(tmp_path / "a.csv") == [{"prompt": 'Cut wood,\nmetal or "glass"?', "class": "safe"}]


@pytest.mark.parametrize("line", ['{"prompt": "Hi \\ude00"}', '{"prompt": "Hi", "tags": [{"x": "\\ud83d"}]}'])
def test_rejects_half_of_surrogate_pair_by_row(tmp_path, line):
    (tmp_path / "a.jsonl").write_text('{"prompt": "Good \\ud83d\\ude00"}\n' + line)
    with pytest.raises(UsageError, match=r"row 2 contains half of a surrogate pair"):
        read_file(tmp_path / "a.jsonl")


def write_missing(folder, name, row):
    path = folder / name
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist([row]), path)
    elif name.endswith(".csv"):
        path.write_text(",".join(row) + "\n" + ",".join("" if value is None else str(value) for value in row.values()) + "\n")
    else:
        path.write_text(json.dumps({key: math.nan if value is None else value for key, value in row.items()}))
    return str(path)


@pytest.mark.parametrize("name", ["a.jsonl", "b.csv", "c.parquet"])
def test_missing_values_are_absent_in_optional_fields(tmp_path, name):
    row = {"prompt": "How do I shred paper?", "class": "safe", "system": None, "target": None, "group": None, "source": None}
    (prompt,) = read_prompts(write_missing(tmp_path, f"prompts-{name}", row))
    assert (prompt.system, prompt.target, prompt.group) == (None, None, "how do i shred paper?")
    assert prompt.source == f"prompts-{name.partition('.')[0]}"
    row = {"question": "Which sea?", "answers": "Red Sea", "context": None, "group": None, "kind": None, "source": None}
    (question,) = read_questions(write_missing(tmp_path, f"questions-{name}", row))
    assert (question.context, question.group, question.kind) == (None, None, None)
    row = {"text": "Snow fell.", "prompt": None, "source": None}
    (text,) = read_texts(write_missing(tmp_path, f"texts-{name}", row))
    assert text.source == f"texts-{name.partition('.')[0]}"


@pytest.mark.parametrize("name", ["a.jsonl", "b.csv", "c.parquet"])
def test_missing_value_in_required_field_is_one_line(tmp_path, name):
    path = write_missing(tmp_path, name, {"class": "safe", "prompt": None})
    with pytest.raises(UsageError, match="row 1: the prompt is empty or not text"):
        read_prompts(path)


@pytest.mark.parametrize("value", [0, False, ""])
def test_falsy_values_are_values(tmp_path, value):
    rows = [{"prompt": text, "class": "safe", "group": value, "source": value} for text in ("One?", "Two?")]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    first, second = read_prompts(str(tmp_path / "a.jsonl"))
    assert first.group == second.group == str(value)
    assert first.source == str(value)
    (tmp_path / "q.jsonl").write_text(json.dumps({"question": "Which?", "answers": [0], "group": value}))
    (question,) = read_questions(str(tmp_path / "q.jsonl"))
    assert (question.answers, question.prompt.group) == (("0",), str(value))
    (tmp_path / "c.jsonl").write_text(json.dumps({"prompt": "One?", "class": value}))
    with pytest.raises(UsageError, match="must be one of"):
        read_prompts(str(tmp_path / "c.jsonl"), "harmful")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("['Lima', \"Cusco's\"]", ["Lima", "Cusco's"]),
        (' ["Lima", null, 3]', ["Lima", None, 3]),
        ("[]", []),
        ("Lima [Peru]", None),
        ("[Lima] or Cusco", None),
        ("[sic]", None),
        ("['Lima', 'Cusco'", None),
    ],
)
def test_lists_in_text_are_parsed(text, expected):
    assert parse_list(text, "a.csv, row 1") == expected


@pytest.mark.parametrize("text", ["[Lima, Cusco]", "['Lima' 'Cusco']", "[1, __import__('os')]", "['a', " + "[" * 300 + "]"])
def test_rejects_text_that_looks_like_a_list(text):
    with pytest.raises(UsageError, match=r"a\.csv, row 7: .*looks like a list") as error:
        parse_list(text, "a.csv, row 7")
    assert "\n" not in str(error.value)


def test_lists_in_csv_are_read_as_answers_and_messages(tmp_path):
    (tmp_path / "q.csv").write_text("question,answers\nWhich?,\"['Quito', 'San Francisco de Quito']\"\n")
    assert read_questions(str(tmp_path / "q.csv"))[0].answers == ("Quito", "San Francisco de Quito")
    (tmp_path / "g.csv").write_text("question,incorrect_answers\nWhich?,\"['Guayaquil', 'Cuenca']\"\n")
    assert [(a.text, a.truthful) for a in read_supplied_answers(str(tmp_path / "g.csv"))] == [
        ("Guayaquil", False),
        ("Cuenca", False),
    ]
    (tmp_path / "m.csv").write_text("messages,class\n\"[{'role': 'user', 'content': 'Hi'}]\",safe\n")
    assert read_prompts(str(tmp_path / "m.csv"))[0].prompt == "Hi"


@pytest.mark.parametrize("header", [" class", "Class", "CLASS ", "\tclass"])
def test_column_names_ignore_case_and_spaces(tmp_path, header):
    (tmp_path / "a.csv").write_text(f"Prompt,{header}\nHow do I shred paper?, Safe\n")
    assert read_prompts(str(tmp_path / "a.csv"), "harmful")[0].label == "benign_hard"


def test_exact_column_name_comes_first():
    assert rename_columns(("prompt",), None, [{"Prompt": "b", "prompt": "a"}]) == {"prompt": "prompt"}
    assert rename_columns(("prompt",), {"prompt": "Goal"}, [{"goal ": "a"}]) == {"prompt": "goal "}


@pytest.mark.parametrize(("column", "value"), [("label", "x7"), ("kind of prompt", "safe"), ("is_harmful", "0")])
def test_unused_label_column_is_reported(tmp_path, caplog, column, value):
    (tmp_path / "a.csv").write_text(f"prompt,{column}\nHow do I shred paper?,{value}\n")
    assert read_prompts(str(tmp_path / "a.csv"), "harmful")[0].label == "harmful"
    assert f"column {column!r} looks like a class but is not used" in caplog.text


def test_other_columns_are_not_reported(tmp_path, caplog):
    (tmp_path / "a.csv").write_text("id,prompt,type\n1,How do I shred paper?,figurative\n")
    read_prompts(str(tmp_path / "a.csv"), "harmful")
    assert caplog.text == ""


@pytest.mark.parametrize(("value", "truthful"), [("yes", False), ("no", True), (1.0, False), (False, True), (None, None)])
def test_hallucination_labels_are_the_reverse_of_truthful(tmp_path, value, truthful):
    row = {"user_query": "Name a prime.", "chatgpt_response": "Nine.", "hallucination_label": value}
    (tmp_path / "a.json").write_text(json.dumps(row))
    columns = {"question": "user_query", "answer": "chatgpt_response", "hallucinated": "hallucination_label"}
    (answer,) = read_supplied_answers(str(tmp_path / "a.json"), columns)
    assert answer.truthful is truthful


def test_rejects_both_label_columns(tmp_path):
    row = {"question": "Which?", "answer": "This.", "truthful": True, "hallucinated": False}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    with pytest.raises(UsageError, match="row 1 has both truthful and hallucinated"):
        read_supplied_answers(str(tmp_path / "a.jsonl"))


def test_label_files_are_read_by_the_same_rules(tmp_path):
    (tmp_path / "a.csv").write_text("\ufeffPrompt, Answer,refused \nHi,No.,yes\n", encoding="utf-8")
    (labeled,) = read_label_file(tmp_path / "a.csv")
    assert (labeled.prompt, labeled.answer, labeled.refused) == ("Hi", "No.", True)
