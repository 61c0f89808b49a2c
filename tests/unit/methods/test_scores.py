"""Scores: each equation by hand, what is refused, and that another package can add one."""

import math
from dataclasses import replace

import pytest
import torch

from tests.support.factories import installed
from trimtab import scores
from trimtab.errors import NotFoundError, UsageError
from trimtab.scores import Generation, ScoreInputs, p_true, similarity
from trimtab.text.normalization import normalize_answer

TRACE = torch.tensor([[-0.1, 0.5, 4.0], [-1.1, 1.5, 1.0], [-0.6, 1.0, 1.0]])
FREE = {"perplexity": -0.6, "min-logprob": -1.1, "entropy": -1.0, "max-entropy": -1.5, "margin": 2.0}
SAMPLED = ("ln-entropy", "eigenscore", "semantic-entropy", "discrete-semantic-entropy", "self-consistency")


def said(text: str, logp: float = -1.0, tokens: int = 3, state: list[float] | None = None, asked: str = "") -> Generation:
    layers = torch.tensor([state or [1.0, 0.0, 0.0]] * 2)
    words = normalize_answer(text)
    news = " ".join(word for word in words.split() if word not in asked.split())
    return Generation(text, words, news, tokens, logp, layers)


def seen(*samples: Generation, answer: str = "Paris.", p: float | None = None) -> ScoreInputs:
    return ScoreInputs(said(answer), TRACE, samples, p)


def one(name: str, answer: ScoreInputs, alike: str = "exact") -> float:
    return scores.measure_scores(name, [answer], alike).item()


@pytest.mark.parametrize(("name", "expected"), FREE.items())
def test_scores_of_the_trace_cost_nothing(name, expected):
    assert one(name, seen()) == pytest.approx(expected)
    assert scores.compute_token_cost(name, [seen(), seen(said("x"))]) == 0


def test_length_normalised_entropy_is_the_samples_mean():
    assert one("ln-entropy", seen(said("a", -0.5), said("b", -1.5), said("c", -4.0))) == pytest.approx(-2.0)


def test_semantic_entropy_by_hand():
    """Two say Paris with e^-1 and e^-2 for each token, one says Lyon with e^-1."""
    answer = seen(said("Paris.", -1.0), said("the paris", -2.0), said("Lyon", -1.0))
    mass = [math.exp(-1) + math.exp(-2), math.exp(-1)]
    shares = [m / sum(mass) for m in mass]
    assert one("semantic-entropy", answer) == pytest.approx(sum(p * math.log(p) for p in shares))
    assert one("discrete-semantic-entropy", answer) == pytest.approx(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3))


def test_samples_that_all_say_the_same_have_no_entropy_and_all_differing_the_most():
    agreed, apart = seen(*[said("Paris")] * 4), seen(*[said(t) for t in ("Paris", "Lyon", "Nice", "Metz")])
    for name in ("semantic-entropy", "discrete-semantic-entropy"):
        assert one(name, agreed) == 0
        assert one(name, apart) == pytest.approx(-math.log(4))


def test_unlikely_samples_count_for_little_and_very_unlikely_ones_break_nothing():
    assert one("semantic-entropy", seen(said("Paris", -0.1), said("Lyon", -30.0))) == pytest.approx(0, abs=1e-9)
    assert one("semantic-entropy", seen(said("Paris", -5000.0), said("Lyon", -5000.0))) == pytest.approx(-math.log(2))


def test_self_consistency_is_the_share_of_samples_that_say_what_the_answer_says():
    samples = [said(t) for t in ("Paris", "paris!", "Lyon", "", "I don't know")]
    assert one("self-consistency", seen(*samples)) == pytest.approx(2 / 5)
    assert one("self-consistency", seen(said("Lyon"))) == 0


def test_eigenscore_by_hand():
    """Of two states (1, 0, -1) and (0, 2, -2) the covariance over d = 3 numbers is [[1, 1], [1, 4]]; alpha 1 makes its
    determinant 2 * 5 - 1. Another layer has another."""
    first, second = said("a", state=[1.0, 0.0, -1.0]), said("b", state=[0.0, 2.0, -2.0])
    make = scores.get_score("eigenscore")
    assert make(alpha=1.0).score_answer(seen(first, second)) == pytest.approx(-math.log(9) / 2)
    by_values = torch.linalg.eigvalsh(torch.tensor([[1.0, 1.0], [1.0, 4.0]]).double() + 1e-3 * torch.eye(2)).log().mean()
    assert one("eigenscore", seen(first, second)) == pytest.approx(-by_values.item())
    moved = [replace(s, state=s.state * torch.tensor([[1.0], [3.0]])) for s in (first, second)]
    assert make(layer=1).score_answer(seen(*moved)) == pytest.approx(
        -(9 * torch.tensor([[1.0, 1], [1, 4]]).double() + 1e-3 * torch.eye(2)).logdet() / 2
    )


def test_eigenscore_falls_as_samples_part_and_half_precision_does_not_hurt_it():
    generator = torch.Generator().manual_seed(0)
    common, noise = 5 * torch.randn(576, generator=generator), torch.randn(10, 576, generator=generator)

    def samples(size: float, dtype: torch.dtype) -> ScoreInputs:
        return seen(*[replace(said(""), state=(common + size * row)[None].to(dtype)) for row in noise])

    sizes = (0.0, 0.1, 0.5, 1.0)
    whole = [one("eigenscore", samples(size, torch.float32)) for size in sizes]
    half = [one("eigenscore", samples(size, torch.float16)) for size in sizes]
    assert whole == sorted(whole, reverse=True)
    assert half == pytest.approx(whole, abs=0.01)


def test_p_true_is_the_letters_odds():
    assert one("p-true", seen(p=0.8)) == pytest.approx(math.log(4))
    assert one("p-true", seen(p=0.5)) == 0
    assert math.isfinite(one("p-true", seen(p=1.0)))
    listed = [("A", 0.4), (" A", 0.1), ("(B", 0.2), ("The", 0.2), ("b", 0.05), ("\n", 0.01)]
    found = p_true.compute_p_true((text, math.log(p)) for text, p in listed)
    assert found == pytest.approx(0.5 / 0.7)
    words = [("A", 0.1), ("True", 0.2), ("False", 0.4), ("No", 0.3)]
    assert p_true.compute_p_true((text, math.log(p)) for text, p in words) == pytest.approx(0.3 / 0.7)


def test_a_letter_that_is_not_listed_is_as_likely_as_the_last_that_is():
    assert p_true.compute_p_true([("A", math.log(0.9)), ("The", math.log(0.1))]) == pytest.approx(0.9)
    assert p_true.compute_p_true([("The", math.log(0.6)), ("It", math.log(0.2))]) == 0.5
    assert p_true.compute_p_true([("A", 0.0), ("B", -math.inf)]) == 1.0


def test_the_question_shows_what_was_asked_and_answered():
    asked = p_true.build_p_true_question("Who?", "Ada.")
    assert "Question: Who?\nProposed Answer: Ada.\n" in asked
    assert asked.index("(A) True") < asked.index("(B) False")


def test_costs_are_tokens_generated_beyond_the_answer():
    answers = [seen(said("a", tokens=4), said("b", tokens=6), p=0.5), seen(said("c", tokens=2), said("d", tokens=2), p=0.5)]
    assert scores.compute_token_cost("p-true", answers) == 1
    assert {scores.compute_token_cost(name, answers) for name in SAMPLED} == {7.0}


def test_what_was_not_collected_is_said_in_one_line():
    nothing, single = seen(), seen(said("Paris"))
    for name in SAMPLED:
        with pytest.raises(
            UsageError, match=rf"score {name} needs at least \d samples .* there are 0: collect with --num_samples"
        ):
            scores.measure_scores(name, [seen(said("a"), said("b")), nothing])
    for name in ("semantic-entropy", "discrete-semantic-entropy", "eigenscore"):
        with pytest.raises(UsageError, match=r"at least 2 samples .* there are 1"):
            scores.measure_scores(name, [single])
    with pytest.raises(UsageError, match="--p_true"):
        scores.measure_scores("p-true", [nothing])
    with pytest.raises(NotFoundError, match="no score 'x'; there are: discrete"):
        scores.measure_scores("x", [nothing])


def test_only_scores_whose_needs_are_met_are_allowed():
    two = [said("a"), said("b")]
    assert set(scores.list_computable([seen()])) == set(FREE)
    assert set(scores.list_computable([seen(said("a"))])) == {*FREE, "ln-entropy", "self-consistency"}
    assert set(scores.list_computable([seen(*two)])) == {*FREE, *SAMPLED}
    assert set(scores.list_computable([seen(*two, p=0.5)])) == {*FREE, *SAMPLED, "p-true"}
    assert set(scores.list_computable([seen(*two, p=0.5), seen()])) == set(FREE)


def test_similarities_by_hand():
    one_way, other = said("The city of Paris", state=[1.0, 0.0, 0.0]), said("Paris, France", state=[1.0, 1.0, 0.0])
    assert similarity.compare_overlap(one_way, other) == pytest.approx(2 / 5)
    assert similarity.compare_states(one_way, other) == pytest.approx(math.sqrt(0.5))
    assert similarity.build_similarity("overlap:0.4")(one_way, other)
    assert not similarity.build_similarity("overlap")(one_way, other)
    assert similarity.build_similarity("states:0.7")(one_way, other)
    assert not similarity.build_similarity("states")(one_way, other)
    assert similarity.compare_exact(said("The 1,000"), said("1000.")) == 1


def test_only_what_the_question_does_not_say_tells_sentences_apart():
    asked = "what is capital of france"
    paris, again, lyon, parrot = (
        said(text, asked=asked)
        for text in (
            "The capital of France is Paris.",
            "It is Paris.",
            "The capital of France is Lyon.",
            "The capital of France.",
        )
    )
    assert similarity.compare_new_words(paris, again) == pytest.approx(2 / 3)
    assert similarity.compare_new_words(paris, lyon) == 0
    assert similarity.compare_overlap(paris, lyon) == pytest.approx(4 / 5)
    assert similarity.compare_new_words(paris, parrot) == similarity.compare_overlap(paris, parrot)
    assert one("discrete-semantic-entropy", seen(paris, again, lyon), "news") > one(
        "discrete-semantic-entropy", seen(paris, again, lyon)
    )


def test_an_empty_sample_is_like_another_empty_one_only():
    assert similarity.compare_overlap(said(""), said("")) == similarity.compare_exact(said(""), said(" ")) == 1
    assert similarity.compare_overlap(said(""), said("Paris")) == similarity.compare_exact(said(""), said("Paris")) == 0
    assert one("discrete-semantic-entropy", seen(said(""), said("Paris"))) == pytest.approx(-math.log(2))


def test_a_similarity_that_cannot_be_is_refused_and_one_of_ones_own_is_taken(monkeypatch):
    with pytest.raises(NotFoundError, match="no similarity 'nli'; there are: exact, overlap, news, states"):
        similarity.build_similarity("nli")
    with pytest.raises(UsageError, match="threshold after the colon"):
        similarity.build_similarity("overlap:high")
    monkeypatch.setattr(similarity, "KNOWN", dict(similarity.KNOWN))
    similarity.register_similarity("initial", lambda a, b: float(a.text[:1] == b.text[:1]), 1.0)
    answer = seen(said("Paris"), said("Pau"), said("Lyon"))
    assert one("self-consistency", answer, "initial") == pytest.approx(2 / 3)


OUTSIDE = """
from trimtab.scores import Score, register


@register("brevity")
class Brevity(Score):
    def score_answer(self, seen):
        return -float(len(seen.trace)) if seen.answer.text else float("nan")
"""


def test_another_package_registers_a_score(tmp_path, monkeypatch):
    monkeypatch.setattr(scores._registry, "_methods", dict(scores._registry._methods))
    installed(tmp_path, "brevity", OUTSIDE, "trimtab.scores")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "brevity" in scores.list_computable([seen()])
    assert one("brevity", seen()) == -3
    with pytest.raises(UsageError, match="score brevity gives nan for answer 1"):
        scores.measure_scores("brevity", [seen(), seen(answer="")])
