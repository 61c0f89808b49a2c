"""Training-free scores of collected answers: their worth, their cost, and the semantic entropies that the head `sep` learns."""

from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from trimtab import scores
from trimtab.detection.training import Parts
from trimtab.evaluation.detection.pooling import Result
from trimtab.jobs.collect.signal_dataset import Collected
from trimtab.jobs.detect import model_selection
from trimtab.scores import Said, Seen, similarity
from trimtab.text.normalization import normalised

# What the head `sep` learns to foretell.
SPREAD = "semantic-entropy"


def results(answers: Sequence[Seen], rows: Mapping[int, Parts], alike: str = "exact") -> list[Result]:
    """Every score that the answers allow, over seeds. `answers` [N] are the data set's, in order; `alike` names the similarity
    by which samples are compared.

    Raises NotFoundError or UsageError for a similarity that is not known.
    """
    similarity.same(alike)
    return [
        model_selection.scored(name, scores.measure(name, answers, alike), scores.cost(name, answers), rows)
        for name in scores.allowed(answers)
    ]


def spread(answers: Sequence[Seen], alike: str = "exact") -> Tensor:
    """Semantic entropies [N] of the answers' samples, in nats; [0] where there are too few samples."""
    return -scores.measure(SPREAD, answers, alike).float() if SPREAD in scores.allowed(answers) else torch.empty(0)


def seen(data: Collected) -> list[Seen]:
    """The answers of a data set as scores see them."""
    # Samples repeat one another, and normalising is what takes the time here.
    plain = lru_cache(maxsize=None)(normalised)

    def said(question: str, text: str, tokens: int, logp: float, state: Tensor) -> Said:
        words, asked = plain(text), set(plain(question).split())
        news = " ".join(word for word in words.split() if word not in asked)
        return Said(text, words, news, tokens, logp, state)

    ends = data.psi[:, :, : data.meta.width]
    return [
        Seen(
            said(question, answer, len(trace), trace[:, 0].mean().item(), end),
            trace,
            tuple(said(question, s.text, s.tokens, s.logp, s.state) for s in samples),
            p_true,
        )
        for question, answer, trace, end, samples, p_true in zip(
            data.questions, data.answers, data.traces, ends, data.samples, data.p_true, strict=True
        )
    ]
