"""Readers of prompt sets: formats, columns, conversations, errors and the bundled set."""

import json
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trimtab.data.prompt import write_prompts
from trimtab.data.prompt_sets import SETS
from trimtab.data.question_form import compute_predictability
from trimtab.data.readers import read_prompts
from trimtab.errors import NotFoundError, UsageError


def test_prompt_file_formats_are_equivalent(tmp_path):
    expected = [("Say hi", "benign_easy"), ("Do harm, now", "harmful")]
    rows = [{"prompt": p, "class": c} for p, c in expected]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.csv").write_text('# a comment\nprompt,class\nSay hi,benign_easy\n"Do harm, now",harmful\n')
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.json", "a.csv", "a.parquet"):
        assert [(p.prompt, p.label) for p in read_prompts(str(tmp_path / name))] == expected


def test_reads_renamed_columns_and_class_words(tmp_path):
    (tmp_path / "x.csv").write_text("text,label\nHow to kill time?,safe\nHow to kill him?,unsafe\n")
    prompts = read_prompts(str(tmp_path / "x.csv"), columns={"prompt": "text", "class": "label"})
    assert [p.label for p in prompts] == ["benign_hard", "harmful"]


def test_reads_and_writes_conversations(tmp_path):
    turns = [
        ("system", "Be brief."),
        ("user", "Hi"),
        ("assistant", "Hello."),
        ("user", "Kill the lights"),
        ("assistant", "Done."),
    ]
    messages = [{"role": r, "content": c} for r, c in turns]
    (tmp_path / "c.jsonl").write_text(json.dumps({"messages": messages, "class": "safe"}))
    (prompt,) = read_prompts(str(tmp_path / "c.jsonl"))
    assert prompt.messages == messages[:-1]
    assert (prompt.prompt, prompt.target, prompt.system) == ("Kill the lights", "Done.", "Be brief.")
    write_prompts([prompt], tmp_path / "again.jsonl")
    (reread,) = read_prompts(str(tmp_path / "again.jsonl"))
    assert (reread.messages, reread.target) == (prompt.messages, prompt.target)


INVALID_FILES = {
    "turns.jsonl": ('{"messages": [{"role": "user"}]}', "row 1: messages must be a list of objects"),
    "answer.jsonl": ('{"messages": [{"role": "system", "content": "x"}]}', "must end with a user message"),
    "nothing.jsonl": ('{"messages": [7]}', "row 1: messages must be a list of objects"),
    "missing.jsonl": (None, "there is no file"),
    "empty.jsonl": ("", "has no rows"),
    "broken.jsonl": ('{"prompt": "a"}\n{"prom', "line 2 is not JSON"),
    "column.csv": ("goal\nx\n", "has no column 'prompt'; it has goal"),
    "class.csv": ("prompt,class\nx,evil\n", "class 'evil' must be one of"),
    "blank.csv": ("prompt\n \n", "row 1: the prompt is empty"),
    "list.json": ('{"a": 1}', "has no column 'prompt'; it has a"),
    "text.txt": ("x", "unsupported file type"),
    "latin.csv": (b"prompt\n\xff\xfe\n", "cannot be read as csv"),
    "not.parquet": ("x", "cannot be read as parquet"),
}


@pytest.mark.parametrize("name", INVALID_FILES)
def test_rejects_invalid_prompt_file_in_one_line(tmp_path, name):
    content, expected = INVALID_FILES[name]
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError) as error:
        read_prompts(str(tmp_path / name), "harmful")
    assert expected in str(error.value)
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_unknown_set_lists_known_sets():
    with pytest.raises(NotFoundError, match="trimtab:contrast"):
        read_prompts("trimtab:nope")


def test_guard_set_has_all_packaged_prompts():
    prompts = read_prompts("trimtab:guard")
    counts = Counter(p.source for p in prompts)
    assert counts.keys() == SETS.keys() - {"guard", "unseen"}
    assert counts["contrast"] == 2444
    assert 0.4 < sum(p.label == "harmful" for p in prompts) / len(prompts) < 0.6


def test_contrast_set_has_balanced_pairs():
    prompts = read_prompts("trimtab:contrast")
    assert Counter(p.label for p in prompts) == {"harmful": 1222, "benign_hard": 1222}
    assert all(count == 2 for count in Counter(p.group for p in prompts).values())
    assert compute_predictability(prompts) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("cell", ['["violence", "personal/data"]', "violence; personal/data", ["violence", "personal/data"]])
def test_labels_are_lists_or_separated_by_semicolons(tmp_path, cell):
    rows = [{"prompt": "a", "topics": cell}, {"prompt": "b", "topics": None}, {"prompt": "c", "topics": ""}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    prompts = read_prompts(str(tmp_path / "rows.jsonl"), columns={"labels": "topics"})
    assert [prompt.labels for prompt in prompts] == [("violence", "personal/data"), (), ()]
    assert [prompt.label for prompt in prompts] == ["harmful", "benign_hard", "benign_hard"]
    write_prompts(prompts, tmp_path / "written.jsonl")
    written = read_prompts(str(tmp_path / "written.jsonl"))
    assert [prompt.labels for prompt in written] == [prompt.labels for prompt in prompts]


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("harmful", "label 'harmful' is a class. Set --columns.class labels"),
        (["a b"], "labels must be names of letters"),
        ([1], "labels must be names of letters"),
        (5, "labels must be names of letters"),
    ],
)
def test_invalid_labels_are_rejected(tmp_path, cell, message):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a", "labels": cell}))
    with pytest.raises(UsageError, match=message):
        read_prompts(str(tmp_path / "rows.jsonl"))
