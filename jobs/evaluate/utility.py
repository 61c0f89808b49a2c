"""Job of `trimtab evaluate utility`, and the utility suites of a study.

One engine answers the questions of all suites under all arms. The frozen model scores the texts.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trimtab import settings
from trimtab.cli.console import console, print_line
from trimtab.data import texts
from trimtab.data.prompt import Prompt, compute_prompts_digest, hash_to_fraction
from trimtab.data.questions import FIELDS, Question, read_all_questions
from trimtab.errors import UsageError
from trimtab.evaluation.safety.results import Arm
from trimtab.evaluation.utility.metrics import MeasuredArm, mark_answers
from trimtab.evaluation.utility.report import build_tables, metrics_as_json
from trimtab.jobs.evaluate.arm_cache import ArmCache
from trimtab.jobs.evaluate.conditions import ConditionedPrompts, judge_prompts, resolve_condition
from trimtab.jobs.evaluate.config import UtilityConfig, UtilitySuite
from trimtab.jobs.evaluate.variants import build_engine_config, build_standard_arms, generate_missing
from trimtab.jobs.runtime.cluster import ray_session, run_task
from trimtab.jobs.runtime.config import as_source_list
from trimtab.judges.answer_matching import parse_expected_number
from trimtab.loading import find_prefixes
from trimtab.model.base_model import BaseModel, resolve_base_model
from trimtab.ray_connection import get_max_node_cores
from trimtab.types import FIXED_REFUSAL, AnswerKind, DType

SHORT, LONG = 32, 320


@dataclass(frozen=True)
class LoadedSuite:
    """Utility suite with loaded data.

    Attributes:
        questions: questions; each has its `kind` of comparison.
        texts: texts, as the targets of prompts.
        max_tokens: maximum length of an answer, in tokens.
        longest: maximum number of tokens of a text to read.
    """

    questions: Sequence[Question]
    texts: Sequence[Prompt]
    max_tokens: int
    longest: int

    def inputs(self, name: str) -> list[dict[str, Any]]:
        """Return the data inputs {name, digest, rows} of a tracked run."""
        data = {"questions": [q.prompt for q in self.questions], "texts": self.texts}
        return [
            {"name": f"{name} {part}", "digest": compute_prompts_digest(prompts), "rows": len(prompts)}
            for part, prompts in data.items()
            if prompts
        ]


def evaluate_utility(config: UtilityConfig) -> list[MeasuredArm]:
    """Measure the utility of every arm.

    Raises:
        TrimtabError: if data or a prefix cannot be used, or the job fails.
    """
    base = resolve_base_model(config.base, config.revision)
    suites = {"suite": load_suite(config, "suite")}
    chosen = {name: prefix for spec in as_source_list(config.prefix) for name, prefix in find_prefixes(spec, base).items()}
    folder = settings.get_home() / "utility" / base.fingerprint
    with ray_session(config.address):
        return measure_utility(base, build_standard_arms(chosen), suites, config.dtype, config.num_gpus, folder)["suite"]


def run_evaluate_utility(config: UtilityConfig) -> dict[str, Any]:
    """Print the tables, and write the answers if configured.

    Returns:
        Metrics without answers, for `--json`.
    """
    measured = evaluate_utility(config)
    for table in build_tables(measured, config.base):
        console.print(table)
    pooled = metrics_as_json(measured, answers=False)
    for arm in pooled["pooled"]:
        if len(arm.get("sets", {})) > 1:
            rates = ", ".join(f"{name} {rate['value']:.2f} of {rate['count']}" for name, rate in arm["sets"].items())
            print_line(f"{arm['arm']}: right on {rates}")
    if config.answers_file:
        Path(config.answers_file).write_text(json.dumps(metrics_as_json(measured), indent=1) + "\n")
    return pooled


def load_suite(suite: UtilitySuite, name: str) -> LoadedSuite:
    """Load the data of a suite.

    Args:
        suite: configuration of the suite.
        name: name of the suite in error messages.

    Raises:
        UsageError: if a column is unknown, a source cannot be read, or a reference answer has no number to compare.
    """
    fields = {*FIELDS, *texts.FIELDS}
    if unknown := set(suite.columns) - fields:
        raise UsageError(f"utility {name}: columns may rename {', '.join(sorted(fields))}, not {', '.join(sorted(unknown))}")
    questions = read_all_questions(_list_sources(suite.questions), _select_columns(suite.columns, FIELDS))
    prompts = texts.read_all_texts(_list_sources(suite.texts), _select_columns(suite.columns, texts.FIELDS))
    questions = [replace(q, kind=suite.kind or q.kind or "contains") for q in questions]
    for question in questions:
        _check_numbers(question)
    kinds: set[AnswerKind | None] = {q.kind for q in questions}
    return LoadedSuite(
        questions=[questions[i] for i in _subsample([q.question for q in questions], suite.limit)],
        texts=[prompts[i] for i in _subsample([p.target or "" for p in prompts], suite.limit)],
        max_tokens=suite.max_tokens or (LONG if "numeric" in kinds else SHORT),
        longest=suite.max_text_tokens,
    )


def measure_utility(
    base: BaseModel, arms: Sequence[Arm], suites: Mapping[str, LoadedSuite], precision: DType, gpus: float, folder: Path
) -> dict[str, list[MeasuredArm]]:
    """Measure every arm on every suite.

    A prefix with a condition has the answers that its condition gives. Texts whose prompts it does not steer have the scores of
    the base model.

    Args:
        base: base model.
        arms: arms to measure, that of the base model first.
        suites: suites by name.
        precision: data type of the model.
        gpus: number of GPUs for the engine, and for reading texts.
        folder: cache of answers and text scores; only missing ones are computed.

    Returns:
        Measured arms of each suite, in the order of `arms`.
    """
    answer_caches = open_answer_caches(base, suites, precision, folder)
    text_caches = {
        name: ArmCache(folder, base.fingerprint, suite.texts, suite.longest, precision)
        for name, suite in suites.items()
        if suite.texts
    }
    generate_missing("answers to questions", base, arms, list(answer_caches.values()), gpus)
    _score_missing_texts(base, arms, text_caches, precision, gpus)
    judged = _judge_conditions(base, arms, suites, precision, gpus)

    def build_measured_arm(name: str, arm: Arm) -> MeasuredArm:
        suite, condition = suites[name], judged.get(arm.name)
        answers = answer_caches[name].read_answers(arm) or [] if name in answer_caches else []
        scores = text_caches[name].read_readings(arm) or [] if name in text_caches else []
        if condition is not None:
            plain = answer_caches[name].read_answers(arms[0]) or [] if name in answer_caches else []
            others = [FIXED_REFUSAL] * len(plain) if condition.condition.otherwise == "refuse" else plain
            answers = condition.choose([q.prompt for q in suite.questions], answers, others)
            scores = condition.choose(suite.texts, scores, text_caches[name].read_readings(arms[0]) or []) if scores else scores
        marks = [mark_answers(q, a) for q, a in zip(suite.questions, answers, strict=True)]
        return MeasuredArm(arm.name, marks, scores)

    return {name: [build_measured_arm(name, arm) for arm in arms] for name in suites}


def open_answer_caches(
    base: BaseModel, suites: Mapping[str, LoadedSuite], precision: DType, folder: Path
) -> dict[str, ArmCache]:
    """Return the cache of the answers to the questions of each suite that has questions; arguments as in `measure_utility`."""
    return {
        name: ArmCache(folder, base.fingerprint, [q.prompt for q in suite.questions], suite.max_tokens, precision)
        for name, suite in suites.items()
        if suite.questions
    }


def _score_missing_texts(
    base: BaseModel, arms: Sequence[Arm], caches: Mapping[str, ArmCache], precision: DType, gpus: float
) -> None:
    """Score the texts of arms that are not cached."""
    missing = {name: [arm for arm in arms if cache.read_readings(arm) is None] for name, cache in caches.items()}
    work = {name: (uncached, caches[name].prompts, caches[name].limit) for name, uncached in missing.items() if uncached}
    if not work:
        return
    task, device = "trimtab.jobs.evaluate.utility_task:score_texts", "cuda" if gpus else "cpu"
    scores = run_task("texts read", task, base, work, precision, device, cpus=get_max_node_cores(), gpus=gpus)
    for name, (uncached, _, _) in work.items():
        for arm, readings in zip(uncached, scores[name], strict=True):
            caches[name].write_readings(arm, readings)


def _judge_conditions(
    base: BaseModel, arms: Sequence[Arm], suites: Mapping[str, LoadedSuite], precision: DType, gpus: float
) -> dict[str, ConditionedPrompts]:
    """Determine which questions and texts each conditional prefix steers, by the name of its arm."""
    prompts = [prompt for suite in suites.values() for prompt in (*(q.prompt for q in suite.questions), *suite.texts)]
    conditions = {arm.name: arm.prefix.card.condition for arm in arms if arm.prefix}
    engine = build_engine_config(precision)
    return {
        name: judge_prompts(resolve_condition(condition, base), base, prompts, engine, gpus)
        for name, condition in conditions.items()
        if condition is not None
    }


def _list_sources(sources: list[str] | str) -> list[str]:
    return as_source_list(sources) if sources else []


def _select_columns(columns: Mapping[str, str], fields: Sequence[str]) -> dict[str, str]:
    return {field: column for field, column in columns.items() if field in fields}


def _check_numbers(question: Question) -> None:
    """Raise UsageError if answers are compared as numbers and a reference answer contains none."""
    if question.kind == "numeric":
        for answer in question.answers:
            parse_expected_number(answer)


def _subsample(contents: Sequence[str], limit: int) -> list[int]:
    """Return at most `limit` indices in ascending order, selected by hash, so that added data changes few; 0 returns all."""
    order = sorted(range(len(contents)), key=lambda i: hash_to_fraction(contents[i], 0))
    return sorted(order[: limit or len(contents)])
