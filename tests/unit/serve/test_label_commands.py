"""Commands that import labels of stored answers, and count them."""

import json

import pytest

from tests.support.live_answers import MODEL, build_answer, build_prompt, get_dataset
from trimtab.data.readers import read_all_prompts
from trimtab.detection.signal_dataset import read_dataset
from trimtab.errors import ArtifactError, UsageError
from trimtab.serve.live.label_commands import run_feedback_import, run_feedback_list
from trimtab.serve.live.label_config import FeedbackImportConfig, FeedbackListConfig, FeedbackPromptsConfig
from trimtab.serve.live.prompt_command import run_feedback_prompts
from trimtab.serve.live.signal_store import SignalStore, StoreLimits

IDS = [f"{number:032x}" for number in range(3)]


@pytest.fixture
def folder(tmp_path):
    store = SignalStore(tmp_path / "signals", MODEL, StoreLimits())
    for number in range(3):
        store(build_answer(number))
        store(build_prompt(number))
    store.stop()
    return tmp_path / "signals"


def import_rows(folder, tmp_path, text, **columns):
    path = tmp_path / "labels.csv"
    path.write_text(text)
    return run_feedback_import(FeedbackImportConfig(str(path), signals=str(folder), columns=columns))


def test_imported_labels_are_those_of_the_answers(folder, tmp_path):
    text = f"id,correct,rater\n{IDS[0]},yes,ann\n{IDS[1]},wrong,ann\n{'f' * 32},1,\n"
    assert import_rows(folder, tmp_path, text) == {"labels": 3, "stored": 2}
    truth = read_dataset(get_dataset(folder)).truthful.tolist()
    assert (truth[:2], truth[2] != truth[2]) == ([1.0, 0.0], True)
    counted, prompts = run_feedback_list(FeedbackListConfig(str(folder)))
    assert counted == {
        "name": get_dataset(folder).name,
        "subject": "answer",
        "models": ["tiny"],
        "rows": 3,
        "labeled": 2,
        "right": 1,
        "trusted": 2,
    }
    assert (prompts["subject"], prompts["rows"], prompts["labeled"]) == ("prompt", 3, 0)


def test_imported_labels_can_be_about_prompts(folder, tmp_path):
    text = f"id,harmful,correct\n{IDS[0]},yes,\n{IDS[1]},no,\n{IDS[1]},,no\n"
    assert import_rows(folder, tmp_path, text) == {"labels": 3, "stored": 3}
    prompts = read_dataset(get_dataset(folder, subject="prompt"))
    assert prompts.meta.subject == "prompt"
    assert prompts.truthful[:2].tolist() == [0.0, 1.0]
    assert prompts.psi[1].unique().tolist() == [0.25]
    assert prompts.windows[1].shape == (2, 2, 4)
    assert read_dataset(get_dataset(folder)).truthful[1] == 0.0
    _, counted = run_feedback_list(FeedbackListConfig(str(folder)))
    assert (counted["labeled"], counted["right"], counted["trusted"]) == (2, 1, 2)


def test_columns_can_have_other_names(folder, tmp_path):
    assert import_rows(folder, tmp_path, f"answer,ok\n{IDS[2]},true\n", id="answer", correct="ok")["stored"] == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,correct\nreq-1,yes\n", "row 1: id must be the x-trimtab-request-id"),
        (f"id,correct\n{'a' * 32},maybe\n", "row 1: correct is 'maybe'"),
        (f"id,correct,choice\n{'a' * 32},yes,-1\n", "row 1: choice must be the index"),
        (f"id,correct,harmful\n{'a' * 32},yes,no\n", "row 1: fill one of the columns"),
    ],
)
def test_no_label_is_imported_from_a_file_with_an_invalid_row(folder, tmp_path, text, message):
    with pytest.raises(UsageError, match=message):
        import_rows(folder, tmp_path, text)
    assert not (folder / "labels").exists()


def test_folder_without_answers_is_reported(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps([{"id": IDS[0], "correct": True}]))
    with pytest.raises(ArtifactError, match="has no stored answers"):
        run_feedback_import(FeedbackImportConfig(str(tmp_path / "rows.json"), signals=str(tmp_path)))


def test_prompts_with_wrong_answers_become_training_rows(folder, tmp_path):
    import_rows(folder, tmp_path, f"id,correct\n{IDS[0]},no\n{IDS[1]},yes\n{IDS[2]},no\n")
    path, out = tmp_path / "log.csv", tmp_path / "rows.jsonl"
    path.write_text(f"id,text\n{IDS[0]},How do I kill weeds?\n{IDS[1]},How do I whisk eggs?\n{'e' * 32},How?\n")
    config = FeedbackPromptsConfig(str(path), signals=str(folder), out=str(out), columns={"prompt": "text"})
    assert run_feedback_prompts(config) == {"rows": 3, "written": 1}
    (prompt,) = read_all_prompts([str(out)], "harmful", {})
    assert (prompt.prompt, prompt.label) == ("How do I kill weeds?", "benign_hard")
    path.write_text(f"id,text\n{IDS[1]},How do I whisk eggs?\n")
    with pytest.raises(UsageError, match="none of 1 answers was labeled as wrong by trusted raters"):
        run_feedback_prompts(config)
