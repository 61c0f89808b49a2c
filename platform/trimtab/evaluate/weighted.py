"""How well risks rank made-up answers above right ones, for many resamples at once: answers count as often as each drew them.

All take risks [N], whether answers are made up [N], and how often each was drawn [R, N], whole numbers; they give [R], NaN
where a resample holds no answer of a class. With every answer drawn once they are the plain figures.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Labels = NDArray[np.bool_]
Times = NDArray[np.integer]
Figure = Callable[[Floats, Labels, Times], Floats]

CATCHING = 0.95


def auroc(risk: Floats, made_up: Labels, times: Times) -> Floats:
    """Share of pairs of a made-up and a right answer that the risk puts in order, ties counting half."""
    wrong, right = _by_risk(risk, made_up, times)
    below = right.cumsum(1) - right / 2
    return _over((wrong * below).sum(1), wrong.sum(1) * right.sum(1))


def auprc(risk: Floats, made_up: Labels, times: Times) -> Floats:
    """Average precision at catching made-up answers."""
    wrong, right = (side[:, ::-1] for side in _by_risk(risk, made_up, times))
    caught = wrong.cumsum(1)
    precision = _over(caught, caught + right.cumsum(1), empty=0.0)
    return _both(_over((wrong * precision).sum(1), caught[:, -1]), right)


def fpr95(risk: Floats, made_up: Labels, times: Times) -> Floats:
    """Share of right answers flagged at the highest threshold that catches 95 % of the made-up ones."""
    wrong, right = (side[:, ::-1] for side in _by_risk(risk, made_up, times))
    caught, alarms = wrong.cumsum(1), right.cumsum(1)
    at = (caught >= CATCHING * caught[:, -1:]).argmax(1)
    return _both(_over(alarms[np.arange(len(alarms)), at], alarms[:, -1]), wrong)


def aurc(risk: Floats, made_up: Labels, times: Times) -> Floats:
    """Area under the risk-coverage curve. Answers of equal risk are given in no order: each counts with their mean.

    Of c answers with error rate p after n given ones with e errors, the j-th adds (e + j p) / (n + j), which is
    p + (e - p n) / (n + j); so a sum over them is one of harmonic numbers.
    """
    wrong, right = _by_risk(risk, made_up, times)
    count = wrong + right
    given, errors = count.cumsum(1), wrong.cumsum(1)
    before, rate = given - count, _over(wrong, count, empty=0.0)
    harmonic = np.append(0.0, (1 / np.arange(1, given[:, -1].max() + 1)).cumsum())
    steps = harmonic[given.astype(np.int64)] - harmonic[before.astype(np.int64)]
    return _both(_over((wrong + (errors - wrong - rate * before) * steps).sum(1), given[:, -1]), wrong, right)


FIGURES: dict[str, Figure] = {"auroc": auroc, "auprc": auprc, "fpr95": fpr95, "aurc": aurc}


def _by_risk(risk: Floats, made_up: Labels, times: Times) -> tuple[Floats, Floats]:
    """Made-up and right answers drawn of each of G different risks, from the lowest up: [R, G] each."""
    order = np.argsort(risk, kind="stable")
    first = np.append(0, np.flatnonzero(np.diff(risk[order])) + 1)
    drawn, wrong = times[:, order].astype(np.float64), made_up[order]
    return np.add.reduceat(drawn * wrong, first, axis=1), np.add.reduceat(drawn * ~wrong, first, axis=1)


def _over(above: Floats, below: Floats, empty: float = float("nan")) -> Floats:
    return np.divide(above, below, out=np.full_like(above, empty), where=below > 0)


def _both(figures: Floats, *sides: Floats) -> Floats:
    """NaN for resamples that hold nothing of a side."""
    return np.where(np.all([side.sum(1) > 0 for side in sides], axis=0), figures, np.nan)
