"""Thresholds for policies that stop answers, calibrated on the highest risk of each unfinished answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch
from rich.table import Table
from torch import Tensor

from trimtab.detection.calibration import compute_thresholds
from trimtab.detection.detector import Detector
from trimtab.detection.signal_dataset import SignalDataset
from trimtab.detection.signals import CHECK_INTERVAL
from trimtab.stats.intervals import Rate, compute_wilson_interval


@dataclass(frozen=True)
class StopResult:
    """Effect of a policy that stops answers, on the test part.

    Attributes:
        level: share of right answers that the threshold should stop.
        threshold: highest risk above which an answer is stopped.
        right_stopped: share of the right answers that are stopped.
        made_up_stopped: share of the made-up answers that are stopped.
        tokens: median number of tokens before a stop; 0 without stops.
        length: median number of tokens of all answers.
    """

    level: str
    threshold: float
    right_stopped: Rate
    made_up_stopped: Rate
    tokens: float
    length: float


def compute_stop_thresholds(detector: Detector, data: SignalDataset, validation: Tensor) -> dict[str, float]:
    """Compute the thresholds of the highest risk of an unfinished answer.

    Args:
        detector: detector of answers.
        data: data set with signals of unfinished answers.
        validation: labeled rows [n] that the detector was calibrated on.

    Returns:
        Threshold by the share of right answers above it.
    """
    highest = [max(risks, default=0.0) for risks in list_running_risks(detector, data, validation)]
    return compute_thresholds(torch.tensor(highest), data.truthful[validation])


def measure_stops(detector: Detector, data: SignalDataset, test: Tensor) -> list[StopResult]:
    """Measure the effect of each threshold on labeled test rows [n]."""
    risks, right = list_running_risks(detector, data, test), (data.truthful[test] == 1).tolist()
    lengths = [len(data.traces[row]) for row in test.tolist()]
    results: list[StopResult] = []
    for level, threshold in detector.card.stop_thresholds.items():
        stops = [_find_stop(values, threshold) for values in risks]
        stopped = {is_right: _compute_rate(stops, right, is_right) for is_right in (True, False)}
        tokens = [stop for stop in stops if stop]
        middle = float(median(tokens)) if tokens else 0.0
        results.append(StopResult(level, threshold, stopped[True], stopped[False], middle, float(median(lengths))))
    return results


def list_running_risks(detector: Detector, data: SignalDataset, rows: Tensor) -> list[list[float]]:
    """List the risks of each unfinished answer, at every `CHECK_INTERVAL` tokens."""
    layers = [data.meta.layers.index(layer) for layer in detector.card.layers]
    return [detector.score_unfinished(data.unfinished[row][:, layers], data.traces[row]).tolist() for row in rows.tolist()]


def build_stop_table(results: Sequence[StopResult]) -> Table:
    """Build a table with one line per threshold."""
    table = Table(title="policy with action stop: test part", title_justify="left")
    for column in (
        "threshold",
        "right answers stopped",
        "made-up answers stopped",
        "tokens before a stop",
        "tokens of an answer",
    ):
        table.add_column(column, no_wrap=True)
    for result in results:
        rates = str(result.right_stopped), str(result.made_up_stopped)
        table.add_row(result.level, *rates, f"{result.tokens:g}", f"{result.length:g}")
    return table


def _compute_rate(stops: Sequence[int], right: Sequence[bool], is_right: bool) -> Rate:
    """Compute the share of stopped answers among the right or the made-up ones."""
    chosen = [stop > 0 for stop, label in zip(stops, right, strict=True) if label == is_right]
    return compute_wilson_interval(sum(chosen), len(chosen))


def _find_stop(risks: Sequence[float], threshold: float) -> int:
    """Return the number of tokens at which the first risk is above a threshold; 0 if none is."""
    return next((CHECK_INTERVAL * number for number, risk in enumerate(risks, 1) if risk > threshold), 0)
