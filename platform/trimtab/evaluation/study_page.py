"""The report of a safety study: a page that asks nothing of the outside, its figures, and the same data as JSON and CSV.

Prompts and answers are foreign text: the template escapes all of it, and the page forbids scripts and requests.
"""

import csv as csvs
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

from trimtab.data.hard_filter import FilterStep
from trimtab.data.prompt import hash_to_fraction
from trimtab.errors import UsageError
from trimtab.evaluation.plotting import inline_svg, save_figure
from trimtab.evaluation.rendering import plain, render_template
from trimtab.evaluation.safety.comparison import (
    ArmComparison,
    PooledArm,
    compare_arms,
    find_first_learned,
    get_arm_name,
    pool_arms,
)
from trimtab.evaluation.safety.figures import draw_figures
from trimtab.evaluation.safety.report import results_as_json
from trimtab.evaluation.safety.results import ArmResult, JudgedAnswer
from trimtab.evaluation.utility.metrics import MeasuredArm
from trimtab.evaluation.utility.metrics import compute_metrics as utility_figures
from trimtab.evaluation.utility.report import metrics_as_csv, metrics_as_json
from trimtab.judges.human_agreement import JudgeStanding
from trimtab.types import BASE_ARM, LABELS

SCHEMA = 1
EXAMPLES = 8
MEASURES = {"refusal": "refuses harmful", "compliance": "helps benign", "balanced": "balanced", "partial": "partial"}


@dataclass(frozen=True)
class TrainingCost:
    """What learning an arm took: the seconds of its steps, the tokens of the rows that it saw, and the most memory that one of
    its workers held; None where it was not measured."""

    arm: str
    seconds: float | None = None
    tokens: int | None = None
    memory_gib: float | None = None


@dataclass(frozen=True)
class StudyReport:
    """Everything a safety report shows. Seeds of an arm are results named `sta#1`, `sta#2`.

    `base` is the base model's name and fingerprint; `parts` the results of every arm on "test", "xstest" and so on; `form` how
    well form alone tells the class before and after the filter; `curves` (step, validation loss) by arm; `utility` what the
    same arms reached on each utility suite.
    """

    title: str
    base: str
    parts: Mapping[str, Sequence[ArmResult]]
    filter_table: Sequence[FilterStep] = ()
    form: tuple[float, float] | None = None
    curves: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict[str, Sequence[tuple[int, float]]])
    costs: Sequence[TrainingCost] = ()
    judge: JudgeStanding | None = None
    notes: Sequence[str] = ()
    utility: Mapping[str, Sequence[MeasuredArm]] = field(default_factory=dict[str, Sequence[MeasuredArm]])


@dataclass(frozen=True)
class AnswerChanges:
    """What an arm answers otherwise than the base arm: pairs of their answers, at most EXAMPLES of each direction."""

    arm: str
    right: Sequence[tuple[JudgedAnswer, JudgedAnswer]]
    wrong: Sequence[tuple[JudgedAnswer, JudgedAnswer]]
    counts: tuple[int, int]


def render_page(study: StudyReport) -> str:
    """One page that holds all it needs. Raises UsageError for a study with an empty part or a name used twice."""
    arms = _arms(study)
    figures = draw_figures(arms, study.curves, _names(study))
    return _page(study, arms, {name: save_figure(figure, "svg") for name, figure in figures.items()})


def report_as_csv(study: StudyReport) -> str:
    """One line for each part, arm and set: the mean over seeds, its interval, and the number of prompts.

    The set `all` is a whole side; `balanced` and `partial` are of both sides."""
    return _csv(_arms(study))


def _csv(arms: Mapping[str, Sequence[PooledArm]]) -> str:
    file = io.StringIO()
    writer = csvs.writer(file, lineterminator="\n")
    writer.writerow(["part", "arm", "seeds", "set", "side", "measure", "value", "low", "high", "prompts"])
    for part, pooled in arms.items():
        for arm in pooled:
            lines = [("all", "harmful", "right", arm.refusal), ("all", "benign", "right", arm.compliance)]
            lines += [("all", "both", "balanced", arm.balanced), ("all", "both", "partial", arm.partial)]
            lines += [(*_set(key), "right", rate) for key, rate in arm.sets.items()]
            for source, side, measure, rate in lines:
                figures = [f"{x:.6f}" if isfinite(x) else "" for x in (rate.value, rate.low, rate.high)]
                writer.writerow([part, arm.name, len(arm.results), source, side, measure, *figures, rate.count])
    return file.getvalue()


def report_as_json(study: StudyReport) -> dict[str, Any]:
    """The study as JSON, its version under `schema`; a figure that does not exist is null.

    Under `parts`, `arms` are single seeds with their answers, and `pooled` are means over seeds."""
    return _json(study, _arms(study))


def _json(study: StudyReport, pooled: Mapping[str, Sequence[PooledArm]]) -> dict[str, Any]:
    form = {"before": study.form[0], "after": study.form[1]} if study.form else None
    return plain(
        {
            "schema": SCHEMA,
            "title": study.title,
            "base": study.base,
            "parts": {
                part: results_as_json(results)
                | {"pooled": [_entry(arm) for arm in pooled[part]]}
                | {"against": v.as_json() if (v := _versus(study, pooled[part])) else None}
                for part, results in study.parts.items()
            },
            "filter": [asdict(step) for step in study.filter_table],
            "form": form,
            "curves": study.curves,
            "costs": [asdict(cost) for cost in study.costs],
            "judge": study.judge.as_json() if study.judge else None,
            "notes": study.notes,
            "utility": {suite: metrics_as_json(measured) for suite, measured in study.utility.items()},
        }
    )


def write_report(study: StudyReport, folder: Path) -> list[Path]:
    """Write report.html, report.json, report.csv, and what there is data for: utility.csv, plane-PART.png and .svg, curves.svg.

    The same study gives the same bytes."""
    arms = _arms(study)
    figures = draw_figures(arms, study.curves, _names(study))
    drawn = {name: save_figure(figure, "svg") for name, figure in figures.items()}
    files = {
        "report.html": _page(study, arms, drawn).encode("utf-8", "replace"),
        "report.json": (json.dumps(_json(study, arms), indent=1, allow_nan=False) + "\n").encode(),
        "report.csv": _csv(arms).encode("utf-8", "replace"),
    }
    if study.utility:
        files["utility.csv"] = metrics_as_csv(study.utility).encode("utf-8", "replace")
    files |= {f"{name}.svg": svg for name, svg in drawn.items()}
    files |= {f"{name}.png": save_figure(figure, "png") for name, figure in figures.items() if name != "curves"}
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return [folder / name for name in files]


def _arms(study: StudyReport) -> dict[str, list[PooledArm]]:
    """The arms of each part over their seeds, the best balanced first."""
    if not study.parts:
        raise UsageError("a study needs at least one part with results")
    arms: dict[str, list[PooledArm]] = {}
    for part, results in study.parts.items():
        if not re.fullmatch(r"\w[\w.-]*", part):
            raise UsageError(f"part {part!r}: its name becomes a file name, so use letters, digits, '.', '-' and '_'")
        if not any(r.refusal.count + r.compliance.count for r in results):
            raise UsageError(f"part {part!r} has no results: leave it out, or evaluate some prompts")
        names = [r.name for r in results]
        if len(set(names)) < len(names):
            raise UsageError(f"part {part!r} has an arm twice ({', '.join(names)}): name its seeds sta#1, sta#2")
        arms[part] = sorted(pool_arms(results), key=lambda a: -a.balanced.value if isfinite(a.balanced.value) else 1.0)
    return arms


def _names(study: StudyReport) -> list[str]:
    """Every result's name, in the order in which the study has them."""
    return [r.name for results in study.parts.values() for r in results]


def _page(study: StudyReport, arms: Mapping[str, Sequence[PooledArm]], drawn: Mapping[str, bytes]) -> str:
    """The template filled in. Only the figures go in unescaped: matplotlib has escaped the names in them."""
    return render_template(
        "page.html.jinja",
        study=study,
        arms=arms,
        measures=MEASURES,
        labels=LABELS,
        best={part: _best(pooled) for part, pooled in arms.items()},
        sets={part: _sets(pooled) for part, pooled in arms.items()},
        against={part: _versus(study, pooled) for part, pooled in arms.items()},
        changes={part: _changes(pooled) for part, pooled in arms.items()},
        figures={name: inline_svg(svg.decode(), name) for name, svg in drawn.items()},
        utility={suite: utility_figures(measured) for suite, measured in study.utility.items()},
        split=_set,
        known=isfinite,
    )


def _versus(study: StudyReport, pooled: Sequence[PooledArm]) -> ArmComparison | None:
    """The arm that the study is about, against the others."""
    return compare_arms(find_first_learned(list(dict.fromkeys(map(get_arm_name, _names(study))))), pooled)


def _sets(arms: Sequence[PooledArm]) -> dict[str, int]:
    """The sets of a part with their numbers of prompts: the harmful sets, then the benign ones."""
    counts = {key: rate.count for arm in arms for key, rate in arm.sets.items()}
    return {key: counts[key] for key in sorted(counts, key=lambda key: (_set(key)[1] != "harmful", key))}


def _best(arms: Sequence[PooledArm]) -> dict[str, str]:
    """The best value of each column as it is shown; nothing where all arms are equal."""
    best: dict[str, str] = {}
    for measure in MEASURES:
        values = [rate.value for rate in (getattr(a, measure) for a in arms) if isfinite(rate.value)]
        shown = [f"{value:.2f}" for value in values]
        if len(set(shown)) > 1:
            best[measure] = min(shown) if measure == "partial" else max(shown)
    return best


def _changes(arms: Sequence[PooledArm]) -> tuple[str, list[AnswerChanges]]:
    """The base arm's name (where none is called so: the least balanced one's), and what each other arm changed.

    Of several seeds the first one answers."""
    base = next((arm for arm in arms if arm.name == BASE_ARM), arms[-1])
    known = {j.prompt: j for j in base.results[0].answers}
    changes: list[AnswerChanges] = []
    for arm in (arm for arm in arms if arm is not base):
        pairs = [(known[j.prompt], j) for j in arm.results[0].answers if j.prompt in known]
        # A fixed choice at random: the first ones would all be of one set.
        pairs.sort(key=lambda pair: hash_to_fraction(pair[1].prompt.prompt, 0))
        right = [pair for pair in pairs if pair[1].right and not pair[0].right]
        wrong = [pair for pair in pairs if pair[0].right and not pair[1].right]
        changes.append(AnswerChanges(arm.results[0].name, right[:EXAMPLES], wrong[:EXAMPLES], (len(right), len(wrong))))
    return base.results[0].name, changes


def _set(key: str) -> tuple[str, str]:
    """Source and side of a set's name, `source (side)`."""
    source, _, side = key.rpartition(" (")
    return source, side.rstrip(")")


def _entry(arm: PooledArm) -> dict[str, Any]:
    """An arm over its seeds, for the JSON."""
    rates = {measure: asdict(getattr(arm, measure)) for measure in MEASURES}
    sets = {key: asdict(rate) for key, rate in arm.sets.items()}
    return {"arm": arm.name, "seeds": [r.name for r in arm.results], **rates, "sets": sets}
