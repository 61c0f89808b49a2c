"""Training-free scores of collected answers: their worth, their cost, and the semantic entropies that the head `sep` learns."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from trimtab import calibration, scores
from trimtab.evaluate import truth
from trimtab.evaluate.truth import Truth
from trimtab.judges.normal import normalised
from trimtab.learning import Parts
from trimtab.scores import Said, Seen, similarity

from .signal_store import Collected

# What the head `sep` learns to foretell.
SPREAD = "semantic-entropy"


@dataclass(frozen=True)
class Free:
    """A score's test figures of each seed, and the `tokens` that it costs: the mean over all answers."""

    name: str
    tokens: float
    by_seed: list[Truth]


def scored(answers: Sequence[Seen], split: Mapping[int, Parts], alike: str = "exact") -> list[Free]:
    """Every score that the answers allow, calibrated on validation as heads are. `answers` [N] are the data set's, in order;
    `alike` names the similarity by which samples are compared.

    Raises NotFoundError or UsageError for a similarity that is not known.
    """
    names = scores.allowed(answers)
    similarity.same(alike)
    return [_one(name, answers, split, alike) for name in names]


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


def _one(name: str, answers: Sequence[Seen], split: Mapping[int, Parts], alike: str) -> Free:
    score = scores.measure(name, answers, alike)
    by_seed: list[Truth] = []
    for seed, rows in split.items():
        test = score[rows.at]
        risk = calibration.risk(test, calibration.platt(score[rows.validation_at], rows.validation.truthful))
        made_up = (rows.test.truthful == 0).numpy()
        by_seed.append(truth.measure(risk.double().numpy(), made_up, torch.sigmoid(-test).numpy(), seed))
    return Free(name, scores.cost(name, answers), by_seed)
