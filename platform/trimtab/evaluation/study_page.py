"""Report of a safety study as a self-contained HTML page, figures, JSON and CSV.

Prompts and answers are untrusted text. The template escapes them, and the page's content security policy forbids scripts and
requests.
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
from trimtab.evaluation.safety.results import LOWER_MEASURES, MEASURES, ArmResult, JudgedAnswer
from trimtab.evaluation.utility.metrics import MeasuredArm, compute_metrics
from trimtab.evaluation.utility.report import metrics_as_csv, metrics_as_json
from trimtab.judges.human_agreement import JudgeStanding
from trimtab.types import BASE_ARM, LABELS

SCHEMA = 1
EXAMPLES = 8


@dataclass(frozen=True)
class TrainingCost:
    """Training cost of an arm; a cost that was not measured is None.

    Attributes:
        arm: name of the arm or seed.
        seconds: total duration of the training steps, in seconds.
        tokens: number of tokens in the training rows that the arm saw.
        memory_gib: peak memory of its largest worker, in GiB.
    """

    arm: str
    seconds: float | None = None
    tokens: int | None = None
    memory_gib: float | None = None


@dataclass(frozen=True)
class SelectedStep:
    """Validation of an arm at the step whose vectors were selected; a measure that was not computed is None.

    Attributes:
        arm: name of the arm or seed.
        step: selected step.
        decision: mean probability of the openers of the right side, from 0 to 1.
        loss: mean loss over the classes, in nats.
    """

    arm: str
    step: int
    decision: float | None = None
    loss: float | None = None


@dataclass(frozen=True)
class StudyReport:
    """Content of the report of a safety study. Seeds of an arm are results named `sta#1`, `sta#2`.

    Attributes:
        title: title of the page.
        base: name and fingerprint of the base model.
        parts: results of every arm by part ("test", "xstest", ...).
        filter_table: steps of the hard filter.
        form: balanced accuracy of classifying prompts by grammatical form alone, before and after the hard filter.
        curves: points (step, validation loss) by arm.
        costs: training costs by arm.
        judge: the judge and its agreement with human labels.
        notes: paragraphs of the last section.
        utility: metrics of the same arms by utility suite.
        selected: validation of each trained arm and seed at its selected step.
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
    selected: Sequence[SelectedStep] = ()


@dataclass(frozen=True)
class AnswerChanges:
    """Answers of an arm whose verdict differs from that of the base arm.

    Attributes:
        arm: name of the arm.
        right: pairs (base answer, arm answer) in which only the arm is right, at most EXAMPLES.
        wrong: pairs (base answer, arm answer) in which only the base arm is right, at most EXAMPLES.
        counts: numbers of all such pairs, (right, wrong).
    """

    arm: str
    right: Sequence[tuple[JudgedAnswer, JudgedAnswer]]
    wrong: Sequence[tuple[JudgedAnswer, JudgedAnswer]]
    counts: tuple[int, int]


def render_page(study: StudyReport) -> str:
    """Render a study as one self-contained HTML page.

    Raises:
        UsageError: if the study has no parts, an empty part, an invalid part name, or duplicate result names.
    """
    arms = _pool_parts(study)
    figures = draw_figures(arms, study.curves, _list_result_names(study))
    return _render(study, arms, {name: save_figure(figure, "svg") for name, figure in figures.items()})


def report_as_csv(study: StudyReport) -> str:
    """Convert a study to CSV: one row per part, arm and set, with the mean over seeds, its interval and the prompt count.

    The set `all` holds all prompts of a side. The measures `balanced`, `partial` and `degenerate` cover both sides.

    Raises:
        UsageError: for the same reasons as `render_page`.
    """
    return _build_csv(_pool_parts(study))


def _build_csv(arms: Mapping[str, Sequence[PooledArm]]) -> str:
    file = io.StringIO()
    writer = csvs.writer(file, lineterminator="\n")
    writer.writerow(["part", "arm", "seeds", "set", "side", "measure", "value", "low", "high", "prompts"])
    for part, pooled in arms.items():
        for arm in pooled:
            rows = [("all", "harmful", "right", arm.refusal), ("all", "benign", "right", arm.compliance)]
            rows += [("all", "harmful", "helpful", arm.harmful_compliance), ("all", "both", "balanced", arm.balanced)]
            rows += [("all", "both", "partial", arm.partial), ("all", "both", "degenerate", arm.degenerate)]
            rows += [(*_split_set_name(key), "right", rate) for key, rate in arm.sets.items()]
            for source, side, measure, rate in rows:
                values = [f"{x:.6f}" if isfinite(x) else "" for x in (rate.value, rate.low, rate.high)]
                writer.writerow([part, arm.name, len(arm.results), source, side, measure, *values, rate.count])
    return file.getvalue()


def report_as_json(study: StudyReport) -> dict[str, Any]:
    """Convert a study to JSON, with the format version under `schema`; a value that does not exist is null.

    For each part, `arms` lists the single seeds with their answers, and `pooled` the means over seeds.

    Raises:
        UsageError: for the same reasons as `render_page`.
    """
    return _build_json(study, _pool_parts(study))


def _build_json(study: StudyReport, pooled: Mapping[str, Sequence[PooledArm]]) -> dict[str, Any]:
    form = {"before": study.form[0], "after": study.form[1]} if study.form else None
    return plain(
        {
            "schema": SCHEMA,
            "title": study.title,
            "base": study.base,
            "parts": {
                part: results_as_json(results)
                | {"pooled": [_arm_as_json(arm) for arm in pooled[part]]}
                | {"against": c.as_json() if (c := _compare_first_learned(study, pooled[part])) else None}
                for part, results in study.parts.items()
            },
            "filter": [asdict(step) for step in study.filter_table],
            "form": form,
            "curves": study.curves,
            "selected": [asdict(step) for step in study.selected],
            "costs": [asdict(cost) for cost in study.costs],
            "judge": study.judge.as_json() if study.judge else None,
            "notes": study.notes,
            "utility": {suite: metrics_as_json(measured) for suite, measured in study.utility.items()},
        }
    )


def write_report(study: StudyReport, folder: Path) -> list[Path]:
    """Write a study to a folder. The same study gives the same bytes.

    Args:
        study: the study to write.
        folder: output folder; created if missing.

    Returns:
        The files: report.html, report.json, report.csv and, if there are data for them, utility.csv, plane-PART.svg,
        plane-PART.png and curves.svg.

    Raises:
        UsageError: for the same reasons as `render_page`.
    """
    arms = _pool_parts(study)
    figures = draw_figures(arms, study.curves, _list_result_names(study))
    images = {name: save_figure(figure, "svg") for name, figure in figures.items()}
    files = {
        "report.html": _render(study, arms, images).encode("utf-8", "replace"),
        "report.json": (json.dumps(_build_json(study, arms), indent=1, allow_nan=False) + "\n").encode(),
        "report.csv": _build_csv(arms).encode("utf-8", "replace"),
    }
    if study.utility:
        files["utility.csv"] = metrics_as_csv(study.utility).encode("utf-8", "replace")
    files |= {f"{name}.svg": svg for name, svg in images.items()}
    files |= {f"{name}.png": save_figure(figure, "png") for name, figure in figures.items() if name != "curves"}
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return [folder / name for name in files]


def _pool_parts(study: StudyReport) -> dict[str, list[PooledArm]]:
    """Validate the parts and pool their arms over seeds, in descending order of the balanced score."""
    if not study.parts:
        raise UsageError("a study needs at least one part with results")
    arms: dict[str, list[PooledArm]] = {}
    for part, results in study.parts.items():
        if not re.fullmatch(r"\w[\w.-]*", part):
            raise UsageError(f"part {part!r}: its name becomes a file name. Use letters, digits, '.', '-' and '_'")
        if not any(r.refusal.count + r.compliance.count for r in results):
            raise UsageError(f"part {part!r} has no results. Remove it, or evaluate some prompts")
        names = [r.name for r in results]
        if len(set(names)) < len(names):
            raise UsageError(f"part {part!r} has an arm twice ({', '.join(names)}). Name its seeds sta#1, sta#2")
        arms[part] = sorted(pool_arms(results), key=lambda a: -a.balanced.value if isfinite(a.balanced.value) else 1.0)
    return arms


def _list_result_names(study: StudyReport) -> list[str]:
    """Return the name of every result, in the order of the study."""
    return [r.name for results in study.parts.values() for r in results]


def _render(study: StudyReport, arms: Mapping[str, Sequence[PooledArm]], images: Mapping[str, bytes]) -> str:
    """Render the page. Only the figures are inserted unescaped, since matplotlib escapes the names in them."""
    return render_template(
        "page.html.jinja",
        study=study,
        arms=arms,
        measures=MEASURES,
        labels=LABELS,
        best={part: _find_best(pooled) for part, pooled in arms.items()},
        sets={part: _count_set_prompts(pooled) for part, pooled in arms.items()},
        against={part: _compare_first_learned(study, pooled) for part, pooled in arms.items()},
        changes={part: _collect_changes(pooled) for part, pooled in arms.items()},
        figures={name: inline_svg(svg.decode(), name) for name, svg in images.items()},
        utility={suite: compute_metrics(measured) for suite, measured in study.utility.items()},
        split=_split_set_name,
        is_finite=isfinite,
    )


def _compare_first_learned(study: StudyReport, pooled: Sequence[PooledArm]) -> ArmComparison | None:
    """Compare the first learned arm of the study with the other arms of a part."""
    return compare_arms(find_first_learned(list(dict.fromkeys(map(get_arm_name, _list_result_names(study))))), pooled)


def _count_set_prompts(arms: Sequence[PooledArm]) -> dict[str, int]:
    """Return the number of prompts of each set of a part, harmful sets first."""
    counts = {key: rate.count for arm in arms for key, rate in arm.sets.items()}
    return {key: counts[key] for key in sorted(counts, key=lambda key: (_split_set_name(key)[1] != "harmful", key))}


def _find_best(arms: Sequence[PooledArm]) -> dict[str, str]:
    """Return the best value of each column as it is displayed; a column whose values are all equal has none."""
    best: dict[str, str] = {}
    for measure in MEASURES:
        values = [rate.value for rate in (getattr(a, measure) for a in arms) if isfinite(rate.value)]
        texts = [f"{value:.2f}" for value in values]
        if len(set(texts)) > 1:
            best[measure] = min(texts) if measure in LOWER_MEASURES else max(texts)
    return best


def _collect_changes(arms: Sequence[PooledArm]) -> tuple[str, list[AnswerChanges]]:
    """Return the name of the base arm and the changed answers of each other arm, by the first seed of each.

    If no arm is named as the base arm, the one with the lowest balanced score takes its place."""
    base = next((arm for arm in arms if arm.name == BASE_ARM), arms[-1])
    base_answers = {j.prompt: j for j in base.results[0].answers}
    changes: list[AnswerChanges] = []
    for arm in (arm for arm in arms if arm is not base):
        pairs = [(base_answers[j.prompt], j) for j in arm.results[0].answers if j.prompt in base_answers]
        # Ordered by a hash of the prompt: the first examples would otherwise all come from one set.
        pairs.sort(key=lambda pair: hash_to_fraction(pair[1].prompt.prompt, 0))
        right = [pair for pair in pairs if pair[1].right and not pair[0].right]
        wrong = [pair for pair in pairs if pair[0].right and not pair[1].right]
        changes.append(AnswerChanges(arm.results[0].name, right[:EXAMPLES], wrong[:EXAMPLES], (len(right), len(wrong))))
    return base.results[0].name, changes


def _split_set_name(key: str) -> tuple[str, str]:
    """Split the name of a set, `source (side)`, into source and side."""
    source, _, side = key.rpartition(" (")
    return source, side.rstrip(")")


def _arm_as_json(arm: PooledArm) -> dict[str, Any]:
    """Convert a pooled arm to JSON."""
    rates = {measure: asdict(getattr(arm, measure)) for measure in MEASURES}
    sets = {key: asdict(rate) for key, rate in arm.sets.items()}
    return {"arm": arm.name, "seeds": [r.name for r in arm.results], **rates, "sets": sets}
