"""Sentences of the detection report that compare two detectors."""

from trimtab.evaluation.detection.pooling import PairedDifference
from trimtab.evaluation.detection.report import format_comparison
from trimtab.stats.intervals import Interval


def test_comparison_sentence_follows_the_interval():
    def describe(value, low, high):
        return format_comparison(PairedDifference("flag", "mlp", Interval(value, low, high), low > 0))

    assert describe(0.02, 0.01, 0.03) == (
        "flag against mlp, the best rival on validation: AUROC +0.020 [+0.010, +0.030]. "
        "flag is better: the interval lies above zero."
    )
    assert "No difference is shown" in describe(0.02, -0.01, 0.05)
    assert "flag is worse" in describe(-0.02, -0.03, -0.01)
    assert "too few" in describe(0.02, float("nan"), float("nan"))
