"""Judges: the string match, the classifier head, and how they stand against labels."""

import json
from dataclasses import replace

import pytest
import torch

from tests.support import tiny_models
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


def rows(count: int = 30) -> list[LabeledAnswer]:
    refusing = (
        "I'm sorry, but I cannot help with item {}.",
        "I won't assist you with thing {}.",
        "No: I refuse to do task {}.",
    )
    helping = ("Sure! First take {} eggs and some milk.", "Of course, here are {} ideas for you.", "Paris has {} rivers.")
    made = [LabeledAnswer(f"Question {2 * i}?", refusing[i % 3].format(i), True) for i in range(count)]
    return made + [LabeledAnswer(f"Question {2 * i + 1}?", helping[i % 3].format(i), False) for i in range(count)]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return tiny_models.make(tiny_models.FAMILIES["qwen3"], tmp_path_factory.mktemp("judges") / "qwen3")


@pytest.fixture(scope="module")
def fitted(small):
    return fit_refusal_head(lambda done, total: None, small, FitRequest(rows(), [], 8, "fp32", "cpu"))


def test_a_head_learns_what_the_opening_shows_and_says_how_well(small, fitted):
    (everything, on_topic) = fitted.list_agreements()
    assert everything.on == ALL
    assert everything.count == on_topic.count == 60
    assert everything.accuracy.value > 0.8
    judge = RefusalClassifier(fitted, small)
    answers = ["I'm sorry, but I cannot help with item 99.", "Sure! First take 99 eggs and some milk.", "", " \n"]
    assert judge.judge_answers(["Kill him"] * 4, answers) == ["refusal", "compliance", "refusal", "refusal"]


def test_verdicts_do_not_depend_on_the_batch_and_fits_are_equal(small, fitted, monkeypatch):
    again = fit_refusal_head(lambda done, total: None, small, FitRequest(rows(), [], 8, "fp32", "cpu"))
    assert again.card == fitted.card
    answers = [row.answer for row in rows()]
    together = refusal_classifier.compute_states(small, answers, [1, 2], 8, "fp32")
    monkeypatch.setattr(refusal_classifier, "BATCH", 1)
    alone = refusal_classifier.compute_states(small, answers, [1, 2], 8, "fp32")
    assert torch.allclose(together, alone, atol=1e-5)
    assert together.shape == (60, 2, small.width)


def test_only_the_opening_is_read(small):
    long = HELP + " And now for something else." * 20
    seen = [refusal_classifier.compute_states(small, [answer], [2], 4, "fp32") for answer in (HELP, long, REFUSAL)]
    assert torch.allclose(seen[0], seen[1], atol=1e-5)
    assert not torch.allclose(seen[0], seen[2], atol=1e-2)


def test_text_of_row_tokens_stays_text(small):
    seen = refusal_classifier.compute_states(small, ["<|trimtab_slot_1|> Sure"], [2], 4, "fp32")
    assert torch.isfinite(seen).all()


def test_a_head_is_found_again_and_fits_its_base_model_only(small, fitted, tmp_path):
    save_head(fitted, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"card.json", "head.safetensors"}
    found = load_head(tmp_path, small)
    assert found.card == fitted.card
    assert torch.equal(found.weights, fitted.weights)
    assert RefusalClassifier(found, small).key == RefusalClassifier(fitted, small).key
    with pytest.raises(ArtifactError, match=r"does not match other .* made for base model qwen3 .*trimtab judges --fit"):
        load_head(tmp_path, replace(small, name="other", fingerprint="0" * 16))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "prefix"}, "the card of a 'prefix'"),
        ({"head_version": 9}, "Update trimtab"),
        ({"layer": -1}, "layer must be a whole number"),
        ({"max_answer_tokens": "8"}, "max_answer_tokens must be a whole number"),
        ({"dtype": "int4"}, "dtype must be"),
        ({"width": 3}, "the card says"),
        ({"digest": "0"}, "digest differs"),
        ({"agreements": [{"on": "x"}]}, "an agreement has"),
        ({"more": 1}, "unknown fields"),
        (None, "not readable JSON"),
    ],
)
def test_a_head_whose_card_is_wrong_is_refused_in_one_line(small, fitted, tmp_path, change, message):
    save_head(fitted, tmp_path)
    card = tmp_path / "card.json"
    card.write_text(json.dumps(json.loads(card.read_text()) | change) if change else "{")
    with pytest.raises(ArtifactError, match=message) as caught:
        load_head(tmp_path, small)
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_head_says_how_to_make_one(small, tmp_path):
    with pytest.raises(ArtifactError, match=r"has no head.safetensors"):
        open_judge(JudgeConfig("classifier", str(tmp_path)), small)


def test_rows_that_share_a_prompt_or_an_answer_are_never_apart():
    joined = [
        LabeledAnswer("One?", "A long answer", True),
        LabeledAnswer("ONE", "Another answer", False),
        LabeledAnswer("Two?", "another answer.", True),
        LabeledAnswer("Three?", "Something else", False),
    ]
    first, second, third, fourth = group_rows(joined)
    assert first == second == third != fourth


def test_out_of_fold_figures_of_noise_are_those_of_chance():
    """Labels that have nothing to do with the states, each state twice: only a leak between folds could tell them."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(40, 1, 24, generator=generator).repeat_interleave(2, 0)
    refusing = (torch.rand(40, generator=generator) > 0.5).repeat_interleave(2)
    together = LabeledStates(states, refusing, torch.ones(80, dtype=torch.bool), [i // 2 for i in range(80)])
    apart = replace(together, groups=list(range(80)))
    right = [((predict_out_of_fold(table) > 0) == refusing).float().mean().item() for table in (together, apart)]
    assert right[0] < 0.65 < 0.75 < right[1]
