"""`trimtab evaluate truth`: from collected data sets to the report, and what the report refuses."""

from trimtab.evaluation.detection.pooling import PairedDifference
from trimtab.evaluation.detection.report import format_comparison
from trimtab.stats.intervals import Interval


def test_sentences_say_what_the_interval_allows():
    def said(value, low, high):
        return format_comparison(PairedDifference("flag", "mlp", Interval(value, low, high), low > 0))

    assert said(0.02, 0.01, 0.03) == (
        "flag against mlp, the best rival on validation: AUROC +0.020 [+0.010, +0.030]. "
        "flag is better: the interval lies above zero."
    )
    assert "No difference is shown" in said(0.02, -0.01, 0.05)
    assert "flag is worse" in said(-0.02, -0.03, -0.01)
    assert "too few" in said(0.02, float("nan"), float("nan"))
