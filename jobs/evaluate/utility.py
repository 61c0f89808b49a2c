"""`trimtab evaluate utility`, and the utility suites of a study: what arms cost in ability.

One engine answers all questions of all suites under all arms; the frozen model reads the texts.
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
from trimtab.jobs.evaluate.config import UtilityConfig, UtilitySuite
from trimtab.jobs.evaluate.variants import build_standard_arms, generate_missing
from trimtab.jobs.runtime.cluster import ray_session, run_task
from trimtab.jobs.runtime.config import as_source_list
from trimtab.judges.answer_matching import parse_expected_number
from trimtab.loading import find_prefixes
from trimtab.model.base_model import BaseModel, resolve_base_model
from trimtab.ray_connection import get_max_node_cores
from trimtab.types import AnswerKind, Precision

SHORT, LONG = 32, 320


@dataclass(frozen=True)
class LoadedSuite:
    """A utility suite that is read: every question says how to compare, and at most `max_tokens` tokens answer it; at most
    `longest` tokens of a text, which is the target of a prompt, are read."""

    questions: Sequence[Question]
    texts: Sequence[Prompt]
    max_tokens: int
    longest: int

    def inputs(self, name: str) -> list[dict[str, Any]]:
        """Data inputs {name, digest, rows} for a tracked run."""
        given = {"questions": [q.prompt for q in self.questions], "texts": self.texts}
        return [
            {"name": f"{name} {what}", "digest": compute_prompts_digest(prompts), "rows": len(prompts)}
            for what, prompts in given.items()
            if prompts
        ]


def evaluate_utility(config: UtilityConfig) -> list[MeasuredArm]:
    """What every arm reached. Raises errors of ours for data and prefixes that cannot be used."""
    base = resolve_base_model(config.base, config.revision)
    suites = {"suite": load_suite(config, "suite")}
    chosen = {name: prefix for spec in as_source_list(config.prefix) for name, prefix in find_prefixes(spec, base).items()}
    folder = settings.get_home() / "utility" / base.fingerprint
    with ray_session(config.address):
        return measure_utility(base, build_standard_arms(chosen), suites, config.precision, config.gpus, folder)["suite"]


def run_evaluate_utility(config: UtilityConfig) -> dict[str, Any]:
    """Print the table; write all answers where asked to."""
    measured = evaluate_utility(config)
    for table in build_tables(measured, config.base):
        console.print(table)
    pooled = metrics_as_json(measured, answers=False)
    for arm in pooled["pooled"]:
        if len(arm.get("sets", {})) > 1:
            shown = ", ".join(f"{name} {rate['value']:.2f} of {rate['count']}" for name, rate in arm["sets"].items())
            print_line(f"{arm['arm']}: right on {shown}")
    if config.answers:
        Path(config.answers).write_text(json.dumps(metrics_as_json(measured), indent=1) + "\n")
    return pooled


def load_suite(suite: UtilitySuite, name: str) -> LoadedSuite:
    """Read a suite's data. Raises UsageError, naming what cannot be read or compared."""
    known = {*FIELDS, *texts.FIELDS}
    if unknown := set(suite.columns) - known:
        raise UsageError(f"utility {name}: columns may rename {', '.join(sorted(known))}, not {', '.join(sorted(unknown))}")
    asked = read_all_questions(_given(suite.questions), _of(suite.columns, FIELDS))
    read = texts.read_all_texts(_given(suite.texts), _of(suite.columns, texts.FIELDS))
    asked = [replace(q, kind=suite.kind or q.kind or "contains") for q in asked]
    for question in asked:
        _check(question)
    kinds: set[AnswerKind | None] = {q.kind for q in asked}
    return LoadedSuite(
        questions=[asked[i] for i in _limited([q.question for q in asked], suite.limit)],
        texts=[read[i] for i in _limited([t.target or "" for t in read], suite.limit)],
        max_tokens=suite.max_tokens or (LONG if "numeric" in kinds else SHORT),
        longest=suite.longest,
    )


def measure_utility(
    base: BaseModel, asked: Sequence[Arm], suites: Mapping[str, LoadedSuite], precision: Precision, gpus: float, folder: Path
) -> dict[str, list[MeasuredArm]]:
    """What every arm reached on every suite; what is kept in `folder` is neither asked nor read again."""
    asking = {
        name: ArmCache(folder, base.fingerprint, [q.prompt for q in suite.questions], suite.max_tokens, precision)
        for name, suite in suites.items()
        if suite.questions
    }
    reading = {name: ArmCache(folder, base.fingerprint, s.texts, s.longest, precision) for name, s in suites.items() if s.texts}
    generate_missing("answers to questions", base, asked, list(asking.values()), gpus)
    _read(base, asked, reading, precision, gpus)

    def measured(name: str, arm: Arm) -> MeasuredArm:
        said = asking[name].read_answers(arm) if name in asking else []
        read = reading[name].read_readings(arm) if name in reading else []
        return MeasuredArm(
            arm.name, [mark_answers(q, a) for q, a in zip(suites[name].questions, said or [], strict=True)], read or []
        )

    return {name: [measured(name, arm) for arm in asked] for name in suites}


def _read(base: BaseModel, asked: Sequence[Arm], stores: Mapping[str, ArmCache], precision: Precision, gpus: float) -> None:
    """Read what is not kept yet."""
    missing = {name: [arm for arm in asked if store.read_readings(arm) is None] for name, store in stores.items()}
    wanted = {name: (those, stores[name].prompts, stores[name].limit) for name, those in missing.items() if those}
    if not wanted:
        return
    task, device = "trimtab.jobs.evaluate.utility_task:score_texts", "cuda" if gpus else "cpu"
    found = run_task("texts read", task, base, wanted, precision, device, cpus=get_max_node_cores(), gpus=gpus)
    for name, (those, _, _) in wanted.items():
        for arm, readings in zip(those, found[name], strict=True):
            stores[name].write_readings(arm, readings)


def _given(several: list[str] | str) -> list[str]:
    return as_source_list(several) if several else []


def _of(columns: Mapping[str, str], fields: Sequence[str]) -> dict[str, str]:
    return {field: column for field, column in columns.items() if field in fields}


def _check(question: Question) -> None:
    """UsageError where numbers are to be compared and a wanted answer has none."""
    if question.kind == "numeric":
        for wanted in question.answers:
            parse_expected_number(wanted)


def _limited(named: Sequence[str], limit: int) -> list[int]:
    """Indices of at most `limit`, chosen by a hash so that more data changes little; 0 takes all."""
    order = sorted(range(len(named)), key=lambda i: hash_to_fraction(named[i], 0))
    return sorted(order[: limit or len(named)])
