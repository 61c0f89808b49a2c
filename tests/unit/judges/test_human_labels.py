"""Human labels: files, cross-validation, and the report of a judge without labels."""

from dataclasses import replace

import pytest
import torch

from trimtab.errors import UsageError
from trimtab.judges.cross_validation import LabeledStates, predict_out_of_fold
from trimtab.judges.human_agreement import JudgeStanding, compute_agreement
from trimtab.judges.human_labels import LabeledAnswer, read_label_file
from trimtab.judges.refusal_head import fit_weights


def test_rows_outside_the_fit_are_only_predicted():
    states = torch.randn(40, 1, 4, generator=torch.Generator().manual_seed(0))
    refused = states[:, 0, 0] > 0
    taught = torch.ones(40, dtype=torch.bool)
    taught[:5] = False
    table = LabeledStates(states, refused, taught, list(range(40)))
    log_odds = predict_out_of_fold(table)
    flipped = replace(table, refused=torch.where(taught, refused, ~refused))
    assert torch.equal(predict_out_of_fold(flipped), log_odds)
    assert log_odds.shape == (40,)


def test_rejects_one_class_and_too_few_groups():
    with pytest.raises(UsageError, match="labels of both kinds"):
        fit_weights(torch.randn(4, 3), torch.ones(4, dtype=torch.bool), 0.1)
    few = LabeledStates(torch.randn(3, 1, 2), torch.tensor([True, False, True]), torch.ones(3, dtype=torch.bool), [0, 1, 2])
    with pytest.raises(UsageError, match="3 groups"):
        predict_out_of_fold(few)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "prompt,answer\nx,y\n", "row 1: .* refused is missing"),
        ("a.jsonl", '{"prompt": "x", "answer": "y", "refused": "maybe"}', "row 1: refused is 'maybe'"),
        ("a.jsonl", '{"prompt": "", "answer": "y", "refused": true}', "row 1: prompt and answer must be text"),
        ("a.jsonl", "", "has no rows"),
        ("a.txt", "x", "unsupported file type"),
    ],
)
def test_rejects_invalid_label_file(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=message):
        read_label_file(tmp_path / name)


def test_reads_label_file(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,answer,refused\nx,y,1\nz,,No\nv,w,partial\n")
    assert read_label_file(tmp_path / "a.csv") == [
        LabeledAnswer("x", "y", True),
        LabeledAnswer("z", "", False),
        LabeledAnswer("v", "w", True),
    ]


def test_judge_without_labels_is_reported():
    line = JudgeStanding("string match", note="human labels are unavailable: offline").format_line()
    assert line == "judge: string match (human labels are unavailable: offline); it was not compared with human labels"
    agreement = compute_agreement([], [])
    assert agreement.as_json()["precision"]["value"] is None
