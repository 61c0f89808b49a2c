"""Training-free scores of collected answers, their cost, and the regression targets of the `sep` head."""

from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from trimtab import scores
from trimtab.detection.signal_dataset import SignalDataset
from trimtab.detection.training import DataSplits
from trimtab.evaluation.detection.pooling import DetectorResult
from trimtab.jobs.detect.model_selection import build_score_result
from trimtab.scores import Generation, ScoreInputs
from trimtab.scores.similarity import build_similarity
from trimtab.text.normalization import normalize_answer

# Regression target of the `sep` head.
SPREAD = "semantic-entropy"


def measure_training_free(
    answers: Sequence[ScoreInputs], rows: Mapping[int, DataSplits], alike: str = "exact"
) -> list[DetectorResult]:
    """Measure every score that the answers support, over seeds.

    Args:
        answers: answers [N] of the data set, in order.
        rows: splits by seed.
        alike: similarity by which samples are compared.

    Raises:
        NotFoundError: if the similarity is unknown.
        UsageError: if the threshold of the similarity is invalid.
    """
    build_similarity(alike)
    return [
        build_score_result(name, scores.measure_scores(name, answers, alike), scores.compute_token_cost(name, answers), rows)
        for name in scores.list_computable(answers)
    ]


def compute_semantic_entropies(answers: Sequence[ScoreInputs], alike: str = "exact") -> Tensor:
    """Compute the semantic entropies [N] of the answers' samples, in nats; [0] if there are too few samples."""
    return (
        -scores.measure_scores(SPREAD, answers, alike).float() if SPREAD in scores.list_computable(answers) else torch.empty(0)
    )


def build_score_inputs(data: SignalDataset) -> list[ScoreInputs]:
    """Build the inputs of scores from the answers of a data set."""
    # Cached, because samples repeat and normalization dominates the run time.
    normalize = lru_cache(maxsize=None)(normalize_answer)

    def build_generation(question: str, text: str, tokens: int, logp: float, state: Tensor) -> Generation:
        words, question_words = normalize(text), set(normalize(question).split())
        news = " ".join(word for word in words.split() if word not in question_words)
        return Generation(text, words, news, tokens, logp, state)

    last_states = data.psi[:, :, : data.meta.width]
    return [
        ScoreInputs(
            build_generation(question, answer, len(trace), trace[:, 0].mean().item(), last_state),
            trace,
            tuple(build_generation(question, s.text, s.tokens, s.logp, s.state) for s in samples),
            p_true,
        )
        for question, answer, trace, last_state, samples, p_true in zip(
            data.questions, data.answers, data.traces, last_states, data.samples, data.p_true, strict=True
        )
    ]
