"""Training-free scores: equations by hand, rejected input, similarities, and registration by other packages."""

import math
from dataclasses import replace

import pytest
import torch

from tests.support.factories import install_package
from trimtab import scores
from trimtab.errors import NotFoundError, UsageError
from trimtab.scores import Generation, ScoreInputs, p_true, similarity
from trimtab.text.normalization import normalize_answer

TRACE = torch.tensor([[-0.1, 0.5, 4.0], [-1.1, 1.5, 1.0], [-0.6, 1.0, 1.0]])
TRACE_SCORES = {"perplexity": -0.6, "min-logprob": -1.1, "entropy": -1.0, "max-entropy": -1.5, "margin": 2.0}
SAMPLE_SCORES = ("ln-entropy", "eigenscore", "semantic-entropy", "discrete-semantic-entropy", "self-consistency")


def make_generation(
    text: str, logp: float = -1.0, tokens: int = 3, state: list[float] | None = None, question: str = ""
) -> Generation:
    """Make a generation of two layers with the same state."""
    states = torch.tensor([state or [1.0, 0.0, 0.0]] * 2)
    words = normalize_answer(text)
    new_words = " ".join(word for word in words.split() if word not in question.split())
    return Generation(text, words, new_words, tokens, logp, states)


def make_generations(*texts: str) -> list[Generation]:
    return [make_generation(text) for text in texts]


def make_inputs(*samples: Generation, answer: str = "Paris.", p: float | None = None) -> ScoreInputs:
    return ScoreInputs(make_generation(answer), TRACE, samples, p)


def compute_score(name: str, inputs: ScoreInputs, similarity_name: str = "exact") -> float:
    return scores.measure_scores(name, [inputs], similarity_name).item()


@pytest.mark.parametrize(("name", "expected"), TRACE_SCORES.items())
def test_trace_scores_by_hand_and_without_cost(name, expected):
    assert compute_score(name, make_inputs()) == pytest.approx(expected)
    assert scores.compute_token_cost(name, [make_inputs(), make_inputs(make_generation("x"))]) == 0


def test_ln_entropy_is_mean_of_samples():
    inputs = make_inputs(make_generation("a", -0.5), make_generation("b", -1.5), make_generation("c", -4.0))
    assert compute_score("ln-entropy", inputs) == pytest.approx(-2.0)


def test_semantic_entropy_by_hand():
    """Two samples are Paris, with e^-1 and e^-2 per token; one is Lyon, with e^-1."""
    inputs = make_inputs(make_generation("Paris.", -1.0), make_generation("the paris", -2.0), make_generation("Lyon", -1.0))
    mass = [math.exp(-1) + math.exp(-2), math.exp(-1)]
    shares = [value / sum(mass) for value in mass]
    assert compute_score("semantic-entropy", inputs) == pytest.approx(sum(share * math.log(share) for share in shares))
    assert compute_score("discrete-semantic-entropy", inputs) == pytest.approx(
        2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3)
    )


def test_semantic_entropy_of_equal_and_of_distinct_samples():
    equal = make_inputs(*make_generations("Paris", "Paris", "Paris", "Paris"))
    distinct = make_inputs(*make_generations("Paris", "Lyon", "Nice", "Metz"))
    for name in ("semantic-entropy", "discrete-semantic-entropy"):
        assert compute_score(name, equal) == 0
        assert compute_score(name, distinct) == pytest.approx(-math.log(4))


@pytest.mark.parametrize(("logps", "expected"), [((-0.1, -30.0), 0), ((-5000.0, -5000.0), -math.log(2))])
def test_semantic_entropy_of_unlikely_samples(logps, expected):
    """An unlikely sample has little weight, and log-probabilities whose exponential is 0 are handled."""
    inputs = make_inputs(make_generation("Paris", logps[0]), make_generation("Lyon", logps[1]))
    assert compute_score("semantic-entropy", inputs) == pytest.approx(expected, abs=1e-9)


def test_self_consistency_is_share_of_samples_equal_to_answer():
    samples = make_generations("Paris", "paris!", "Lyon", "", "I don't know")
    assert compute_score("self-consistency", make_inputs(*samples)) == pytest.approx(2 / 5)
    assert compute_score("self-consistency", make_inputs(make_generation("Lyon"))) == 0


def test_eigenscore_by_hand():
    """The states (1, 0, -1) and (0, 2, -2) have the covariance [[1, 1], [1, 4]] over d = 3 numbers. With alpha = 1 the
    determinant is 2 * 5 - 1. The score depends on the layer."""
    first, second = make_generation("a", state=[1.0, 0.0, -1.0]), make_generation("b", state=[0.0, 2.0, -2.0])
    eigenscore = scores.get_score("eigenscore")
    assert eigenscore(alpha=1.0).score_answer(make_inputs(first, second)) == pytest.approx(-math.log(9) / 2)
    from_eigenvalues = torch.linalg.eigvalsh(torch.tensor([[1.0, 1.0], [1.0, 4.0]]).double() + 1e-3 * torch.eye(2)).log().mean()
    assert compute_score("eigenscore", make_inputs(first, second)) == pytest.approx(-from_eigenvalues.item())
    scaled = [replace(generation, state=generation.state * torch.tensor([[1.0], [3.0]])) for generation in (first, second)]
    assert eigenscore(layer=1).score_answer(make_inputs(*scaled)) == pytest.approx(
        -(9 * torch.tensor([[1.0, 1], [1, 4]]).double() + 1e-3 * torch.eye(2)).logdet() / 2
    )


def test_eigenscore_falls_with_spread_also_in_half_precision():
    generator = torch.Generator().manual_seed(0)
    common, noise = 5 * torch.randn(576, generator=generator), torch.randn(10, 576, generator=generator)

    def make_samples(spread: float, dtype: torch.dtype) -> ScoreInputs:
        return make_inputs(*[replace(make_generation(""), state=(common + spread * row)[None].to(dtype)) for row in noise])

    spreads = (0.0, 0.1, 0.5, 1.0)
    single_precision = [compute_score("eigenscore", make_samples(spread, torch.float32)) for spread in spreads]
    half_precision = [compute_score("eigenscore", make_samples(spread, torch.float16)) for spread in spreads]
    assert single_precision == sorted(single_precision, reverse=True)
    assert half_precision == pytest.approx(single_precision, abs=0.01)


def test_p_true_is_log_odds_of_letters():
    assert compute_score("p-true", make_inputs(p=0.8)) == pytest.approx(math.log(4))
    assert compute_score("p-true", make_inputs(p=0.5)) == 0
    assert math.isfinite(compute_score("p-true", make_inputs(p=1.0)))
    probabilities = [("A", 0.4), (" A", 0.1), ("(B", 0.2), ("The", 0.2), ("b", 0.05), ("\n", 0.01)]
    assert p_true.compute_p_true((text, math.log(p)) for text, p in probabilities) == pytest.approx(0.5 / 0.7)
    words = [("A", 0.1), ("True", 0.2), ("False", 0.4), ("No", 0.3)]
    assert p_true.compute_p_true((text, math.log(p)) for text, p in words) == pytest.approx(0.3 / 0.7)


def test_p_true_gives_missing_letter_the_lowest_listed_probability():
    assert p_true.compute_p_true([("A", math.log(0.9)), ("The", math.log(0.1))]) == pytest.approx(0.9)
    assert p_true.compute_p_true([("The", math.log(0.6)), ("It", math.log(0.2))]) == 0.5
    assert p_true.compute_p_true([("A", 0.0), ("B", -math.inf)]) == 1.0


def test_p_true_question_has_question_and_answer():
    text = p_true.build_p_true_question("Who?", "Ada.")
    assert "Question: Who?\nProposed Answer: Ada.\n" in text
    assert text.index("(A) True") < text.index("(B) False")


def test_cost_is_mean_of_tokens_beyond_the_answer():
    inputs = [
        make_inputs(make_generation("a", tokens=4), make_generation("b", tokens=6), p=0.5),
        make_inputs(make_generation("c", tokens=2), make_generation("d", tokens=2), p=0.5),
    ]
    assert scores.compute_token_cost("p-true", inputs) == 1
    assert {scores.compute_token_cost(name, inputs) for name in SAMPLE_SCORES} == {7.0}


@pytest.mark.parametrize("name", SAMPLE_SCORES)
def test_rejects_inputs_without_samples(name):
    with pytest.raises(UsageError, match=rf"score {name} needs at least \d samples .* there are 0: collect with --num_samples"):
        scores.measure_scores(name, [make_inputs(*make_generations("a", "b")), make_inputs()])


@pytest.mark.parametrize("name", ["semantic-entropy", "discrete-semantic-entropy", "eigenscore"])
def test_rejects_inputs_with_one_sample(name):
    with pytest.raises(UsageError, match=r"at least 2 samples .* there are 1"):
        scores.measure_scores(name, [make_inputs(make_generation("Paris"))])


def test_rejects_missing_p_true_and_unknown_score():
    with pytest.raises(UsageError, match="--p_true"):
        scores.measure_scores("p-true", [make_inputs()])
    with pytest.raises(NotFoundError, match="no score 'x'; there are: discrete"):
        scores.measure_scores("x", [make_inputs()])


def test_lists_only_computable_scores():
    two = make_generations("a", "b")
    assert set(scores.list_computable([make_inputs()])) == set(TRACE_SCORES)
    assert set(scores.list_computable([make_inputs(make_generation("a"))])) == {*TRACE_SCORES, "ln-entropy", "self-consistency"}
    assert set(scores.list_computable([make_inputs(*two)])) == {*TRACE_SCORES, *SAMPLE_SCORES}
    assert set(scores.list_computable([make_inputs(*two, p=0.5)])) == {*TRACE_SCORES, *SAMPLE_SCORES, "p-true"}
    assert set(scores.list_computable([make_inputs(*two, p=0.5), make_inputs()])) == set(TRACE_SCORES)


def test_similarities_by_hand():
    first, second = (
        make_generation("The city of Paris", state=[1.0, 0.0, 0.0]),
        make_generation("Paris, France", state=[1.0, 1.0, 0.0]),
    )
    assert similarity.compare_overlap(first, second) == pytest.approx(2 / 5)
    assert similarity.compare_states(first, second) == pytest.approx(math.sqrt(0.5))
    assert similarity.build_similarity("overlap:0.4")(first, second)
    assert not similarity.build_similarity("overlap")(first, second)
    assert similarity.build_similarity("states:0.7")(first, second)
    assert not similarity.build_similarity("states")(first, second)
    assert similarity.compare_exact(make_generation("The 1,000"), make_generation("1000.")) == 1


def test_new_words_similarity_ignores_words_of_the_question():
    question = "what is capital of france"
    paris, short_paris, lyon, repetition = (
        make_generation(text, question=question)
        for text in (
            "The capital of France is Paris.",
            "It is Paris.",
            "The capital of France is Lyon.",
            "The capital of France.",
        )
    )
    assert similarity.compare_new_words(paris, short_paris) == pytest.approx(2 / 3)
    assert similarity.compare_new_words(paris, lyon) == 0
    assert similarity.compare_overlap(paris, lyon) == pytest.approx(4 / 5)
    assert similarity.compare_new_words(paris, repetition) == similarity.compare_overlap(paris, repetition)
    inputs = make_inputs(paris, short_paris, lyon)
    assert compute_score("discrete-semantic-entropy", inputs, "news") > compute_score("discrete-semantic-entropy", inputs)


def test_empty_sample_equals_only_empty_samples():
    empty, blank, paris = make_generations("", " ", "Paris")
    assert similarity.compare_overlap(empty, empty) == similarity.compare_exact(empty, blank) == 1
    assert similarity.compare_overlap(empty, paris) == similarity.compare_exact(empty, paris) == 0
    assert compute_score("discrete-semantic-entropy", make_inputs(empty, paris)) == pytest.approx(-math.log(2))


def test_rejects_invalid_similarity():
    with pytest.raises(NotFoundError, match="no similarity 'nli'; there are: exact, overlap, news, states"):
        similarity.build_similarity("nli")
    with pytest.raises(UsageError, match="threshold after the colon"):
        similarity.build_similarity("overlap:high")


def test_registers_similarity(monkeypatch):
    monkeypatch.setattr(similarity, "SIMILARITIES", dict(similarity.SIMILARITIES))
    similarity.register_similarity("initial", lambda a, b: float(a.text[:1] == b.text[:1]), 1.0)
    inputs = make_inputs(*make_generations("Paris", "Pau", "Lyon"))
    assert compute_score("self-consistency", inputs, "initial") == pytest.approx(2 / 3)


PACKAGE_SOURCE = """
from trimtab.scores import Score, register


@register("brevity")
class Brevity(Score):
    def score_answer(self, inputs):
        return -float(len(inputs.trace)) if inputs.answer.text else float("nan")
"""


def test_other_package_registers_score(tmp_path, monkeypatch):
    monkeypatch.setattr(scores._registry, "_methods", dict(scores._registry._methods))
    install_package(tmp_path, "brevity", PACKAGE_SOURCE, "trimtab.scores")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "brevity" in scores.list_computable([make_inputs()])
    assert compute_score("brevity", make_inputs()) == -3
    with pytest.raises(UsageError, match="score brevity gives nan for answer 1"):
        scores.measure_scores("brevity", [make_inputs(), make_inputs(answer="")])
