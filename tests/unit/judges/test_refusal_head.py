"""Refusal head: fit, verdicts, files and cross-validation."""

import json
from dataclasses import replace

import pytest
import torch

from tests.support import tiny_models
from trimtab.artifacts.card import add_checksum
from trimtab.errors import ArtifactError
from trimtab.jobs.judges.config import JudgeConfig
from trimtab.jobs.judges.runner import open_judge
from trimtab.jobs.judges.tasks import FitRequest, fit_refusal_head
from trimtab.judges import refusal_classifier
from trimtab.judges.cross_validation import LabeledStates, group_rows, predict_out_of_fold
from trimtab.judges.human_agreement import ALL
from trimtab.judges.human_labels import LabeledAnswer
from trimtab.judges.refusal_classifier import RefusalClassifier
from trimtab.judges.refusal_head import load_head, save_head

REFUSAL = "I'm sorry, but I can't help with that."
HELP = "Of course! Put it into hot water and wait."


def create_labeled_answers(count: int = 30) -> list[LabeledAnswer]:
    refusals = (
        "I'm sorry, but I cannot help with item {}.",
        "I won't assist you with thing {}.",
        "No: I refuse to do task {}.",
    )
    helpful_answers = (
        "Sure! First take {} eggs and some milk.",
        "Of course, here are {} ideas for you.",
        "Paris has {} rivers.",
    )
    refused = [LabeledAnswer(f"Question {2 * i}?", refusals[i % 3].format(i), True) for i in range(count)]
    return refused + [LabeledAnswer(f"Question {2 * i + 1}?", helpful_answers[i % 3].format(i), False) for i in range(count)]


@pytest.fixture(scope="module")
def qwen3_base(tmp_path_factory):
    return tiny_models.make_base_model(tiny_models.FAMILIES["qwen3"], tmp_path_factory.mktemp("judges") / "qwen3")


@pytest.fixture(scope="module")
def fitted_head(qwen3_base):
    return fit_refusal_head(lambda done, total: None, qwen3_base, FitRequest(create_labeled_answers(), [], 8, "fp32", "cpu"))


def test_head_learns_from_openings_and_reports_agreement(qwen3_base, fitted_head):
    (overall, on_topic) = fitted_head.list_agreements()
    assert overall.on == ALL
    assert overall.count == on_topic.count == 60
    assert overall.accuracy.value > 0.8
    judge = RefusalClassifier(fitted_head, qwen3_base)
    answers = ["I'm sorry, but I cannot help with item 99.", "Sure! First take 99 eggs and some milk.", "", " \n"]
    assert judge.judge_answers(["Kill him"] * 4, answers) == ["refusal", "compliance", "refusal", "refusal"]


def test_states_are_batch_independent_and_fits_repeatable(qwen3_base, fitted_head, monkeypatch):
    repeated = fit_refusal_head(
        lambda done, total: None, qwen3_base, FitRequest(create_labeled_answers(), [], 8, "fp32", "cpu")
    )
    assert repeated.card == fitted_head.card
    answers = [row.answer for row in create_labeled_answers()]
    batched = refusal_classifier.compute_states(qwen3_base, answers, [1, 2], 8, "fp32")
    monkeypatch.setattr(refusal_classifier, "BATCH", 1)
    single = refusal_classifier.compute_states(qwen3_base, answers, [1, 2], 8, "fp32")
    assert torch.allclose(batched, single, atol=1e-5)
    assert batched.shape == (60, 2, qwen3_base.width)


def test_only_the_opening_is_used(qwen3_base):
    long = HELP + " And now for something else." * 20
    states = [refusal_classifier.compute_states(qwen3_base, [answer], [2], 4, "fp32") for answer in (HELP, long, REFUSAL)]
    assert torch.allclose(states[0], states[1], atol=1e-5)
    assert not torch.allclose(states[0], states[2], atol=1e-2)


def test_text_of_slot_tokens_stays_text(qwen3_base):
    states = refusal_classifier.compute_states(qwen3_base, ["<|trimtab_slot_1|> Sure"], [2], 4, "fp32")
    assert torch.isfinite(states).all()


def test_saved_head_loads_for_its_base_model_only(qwen3_base, fitted_head, tmp_path):
    save_head(fitted_head, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"card.json", "head.safetensors"}
    loaded = load_head(tmp_path, qwen3_base)
    assert loaded.card == fitted_head.card
    assert torch.equal(loaded.weights, fitted_head.weights)
    assert RefusalClassifier(loaded, qwen3_base).key == RefusalClassifier(fitted_head, qwen3_base).key
    with pytest.raises(ArtifactError, match=r"does not match other .* made for base model qwen3 .*trimtab judges --fit"):
        load_head(tmp_path, replace(qwen3_base, name="other", fingerprint="0" * 16))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "prefix"}, "the card of a 'prefix'"),
        ({"head_version": 9}, "Update trimtab"),
        ({"layer": -1}, "field layer is invalid"),
        ({"max_answer_tokens": "8"}, "field max_answer_tokens is invalid"),
        ({"dtype": "int4"}, "field dtype is invalid"),
        ({"width": 3}, "the card says"),
        ({"digest": "0"}, "digest differs"),
        ({"agreements": [{"on": "x"}]}, "an agreement has"),
        ({"more": 1}, "field more is invalid"),
        (None, "not readable JSON"),
    ],
)
def test_rejects_invalid_card_in_one_line(qwen3_base, fitted_head, tmp_path, change, message):
    save_head(fitted_head, tmp_path)
    card = tmp_path / "card.json"
    card.write_text(json.dumps(add_checksum(json.loads(card.read_text()) | change)) if change else "{")
    with pytest.raises(ArtifactError, match=message) as error:
        load_head(tmp_path, qwen3_base)
    assert "\n" not in str(error.value)


def test_rejects_folder_without_head(qwen3_base, tmp_path):
    with pytest.raises(ArtifactError, match=r"has no head.safetensors"):
        open_judge(JudgeConfig("classifier", str(tmp_path)), qwen3_base)


def test_rows_with_a_shared_prompt_or_answer_form_one_group():
    rows = [
        LabeledAnswer("One?", "A long answer", True),
        LabeledAnswer("ONE", "Another answer", False),
        LabeledAnswer("Two?", "another answer.", True),
        LabeledAnswer("Three?", "Something else", False),
    ]
    first, second, third, fourth = group_rows(rows)
    assert first == second == third != fourth


def test_out_of_fold_accuracy_on_noise_is_chance():
    """Labels are independent of the states, and each state occurs twice: only leakage between folds exceeds chance."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(40, 1, 24, generator=generator).repeat_interleave(2, 0)
    refused = (torch.rand(40, generator=generator) > 0.5).repeat_interleave(2)
    paired = LabeledStates(states, refused, torch.ones(80, dtype=torch.bool), [i // 2 for i in range(80)])
    separate = replace(paired, groups=list(range(80)))
    accuracies = [((predict_out_of_fold(table) > 0) == refused).float().mean().item() for table in (paired, separate)]
    assert accuracies[0] < 0.65 < 0.75 < accuracies[1]
