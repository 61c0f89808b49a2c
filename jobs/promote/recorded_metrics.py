"""Gate metrics without a set: the metrics on the cards, and the gain over the champion on the cases that both runs recorded."""

import numpy as np

from trimtab.data.prompt import Prompt
from trimtab.errors import UsageError
from trimtab.evaluation.detection.metrics import compute_auroc
from trimtab.evaluation.detection.pooling import SeedRisks, draw_resamples, estimate_paired_difference
from trimtab.evaluation.promotion_rules import MeasuredMetrics, PromotionRule
from trimtab.evaluation.safety.comparison import estimate_difference
from trimtab.evaluation.safety.results import JudgedAnswer, summarize_answers
from trimtab.jobs.promote.prefix_metrics import SIDES
from trimtab.stats.intervals import Interval, Rate
from trimtab.tracking.registry import Version
from trimtab.tracking.run_artifacts import read_json_artifact

PARTS = ("validation", "test")
PREFIX_REPORT, DETECTOR_REPORT = "evaluation/report.json", "evaluation/risks.json"
NAN = float("nan")


def read_card_metric(rule: PromotionRule, version: Version, champion: Version | None) -> MeasuredMetrics:
    """Read the metric of a rule without a set from the cards of a version and its champion.

    Returns:
        The metric of the version, and its difference to the champion's on the cases that both runs recorded. The interval of
        the difference is NaN if the runs have no cases in common. None without a champion, or if it has no such metric.

    Raises:
        UsageError: if the version has no such metric.
        TrackingError: if a report cannot be read.
    """
    if rule.metric not in version.metrics:
        available = ", ".join(sorted(version.metrics)) or "none"
        raise UsageError(
            f"rule on {rule.metric}: version {version.version} has no such metric (available: {available}). "
            "Choose an available metric, or name a set"
        )
    value = version.metrics[rule.metric]
    measured = Interval(value, value, value)
    if champion is None or rule.metric not in champion.metrics:
        return measured, None
    gain = value - champion.metrics[rule.metric]
    if rule.over_champion is None or not rule.interval:
        return measured, Interval(gain, gain, gain)
    compare = _compare_detectors if version.kind == "detector" else _compare_prefixes
    part, _, metric = rule.metric.partition("_")
    return measured, (compare(part, metric, version, champion) if part in PARTS else None) or Rate(gain, NAN, NAN, 0)


def _compare_prefixes(part: str, metric: str, version: Version, champion: Version) -> Rate | None:
    """Compare two prefixes on the prompts of a part that both answered; None if there are none of a needed side."""
    sides = next((sides for measure, sides in SIDES.items() if measure == metric and sides), None)
    answers = [_read_answers(part, v) for v in (version, champion)]
    if sides is None:
        return None
    common = [key for key in answers[0] if key in answers[1]]
    if not all(any(answers[0][key].harmful == side for key in common) for side in sides):
        return None
    first, rival = (summarize_answers("", [recorded[key] for key in common]) for recorded in answers)
    return estimate_difference([first], [rival], sides=sides)


def _read_answers(part: str, version: Version) -> dict[tuple[str, str], JudgedAnswer]:
    """Read the judged answers of a prefix from the report of its run, by prompt and class.

    Prompts of one key are equal in all reports: other fields are not recorded, or not compared.
    """
    arms = read_json_artifact(version.run_id, PREFIX_REPORT).get(part, {}).get("arms", [])
    recorded = next((arm.get("answers", []) for arm in arms if arm["name"] == version.name), [])
    return {
        (entry["prompt"], entry["class"]): JudgedAnswer(
            Prompt(entry["prompt"], entry["class"], source="", group=""), entry["answer"], entry["verdict"]
        )
        for entry in recorded
    }


def _compare_detectors(part: str, metric: str, version: Version, champion: Version) -> Rate | None:
    """Compare two detectors on the answers of a part that are in that part for both; None if a class is missing."""
    if metric != "auroc":
        return None
    first, rival = (read_json_artifact(v.run_id, DETECTOR_REPORT).get(part, {}) for v in (version, champion))
    keys = sorted(first.keys() & rival.keys())
    made_up = np.array([first[key]["made_up"] for key in keys], dtype=bool)
    if not made_up.any() or made_up.all():
        return None
    rows = np.arange(len(keys))
    risks = [np.array([recorded[key]["risk"] for key in keys], dtype=np.float64) for recorded in (first, rival)]
    tests = [[SeedRisks(0, rows, risk, risk, made_up)] for risk in risks]
    resamples = draw_resamples([first[key]["group"] for key in keys], 1)
    difference = estimate_paired_difference(compute_auroc, tests[0], tests[1], resamples)
    return Rate(difference.value, difference.low, difference.high, len(keys))
