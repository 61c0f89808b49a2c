"""Training-free scores of collected answers: their worth, their cost, and the semantic entropies that the head `sep` learns."""

from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from trimtab import scores
from trimtab.detection.training import DataSplits
from trimtab.evaluation.detection.pooling import DetectorResult
from trimtab.jobs.collect.signal_dataset import SignalDataset
from trimtab.jobs.detect.model_selection import build_score_result
from trimtab.scores import Generation, ScoreInputs
from trimtab.scores.similarity import build_similarity
from trimtab.text.normalization import normalize_answer

# What the head `sep` learns to foretell.
SPREAD = "semantic-entropy"


def measure_training_free(
    answers: Sequence[ScoreInputs], rows: Mapping[int, DataSplits], alike: str = "exact"
) -> list[DetectorResult]:
    """Every score that the answers allow, over seeds. `answers` [N] are the data set's, in order; `alike` names the similarity
    by which samples are compared.

    Raises NotFoundError or UsageError for a similarity that is not known.
    """
    build_similarity(alike)
    return [
        build_score_result(name, scores.measure_scores(name, answers, alike), scores.compute_token_cost(name, answers), rows)
        for name in scores.list_computable(answers)
    ]


def compute_semantic_entropies(answers: Sequence[ScoreInputs], alike: str = "exact") -> Tensor:
    """Semantic entropies [N] of the answers' samples, in nats; [0] where there are too few samples."""
    return (
        -scores.measure_scores(SPREAD, answers, alike).float() if SPREAD in scores.list_computable(answers) else torch.empty(0)
    )


def build_score_inputs(data: SignalDataset) -> list[ScoreInputs]:
    """The answers of a data set as scores see them."""
    # Samples repeat one another, and normalising is what takes the time here.
    plain = lru_cache(maxsize=None)(normalize_answer)

    def said(question: str, text: str, tokens: int, logp: float, state: Tensor) -> Generation:
        words, asked = plain(text), set(plain(question).split())
        news = " ".join(word for word in words.split() if word not in asked)
        return Generation(text, words, news, tokens, logp, state)

    ends = data.psi[:, :, : data.meta.width]
    return [
        ScoreInputs(
            said(question, answer, len(trace), trace[:, 0].mean().item(), end),
            trace,
            tuple(said(question, s.text, s.tokens, s.logp, s.state) for s in samples),
            p_true,
        )
        for question, answer, trace, end, samples, p_true in zip(
            data.questions, data.answers, data.traces, ends, data.samples, data.p_true, strict=True
        )
    ]
