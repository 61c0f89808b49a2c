"""`trimtab evaluate utility`, and the utility suites of a study: what arms cost in ability.

One engine answers all questions of all suites under all arms; the frozen model reads the texts.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trimtab import ray_connection, settings
from trimtab.cli.console import console, say
from trimtab.data import prompt as rows
from trimtab.data import questions, texts
from trimtab.data.prompt import Prompt, fraction
from trimtab.data.questions import Question
from trimtab.errors import UsageError
from trimtab.evaluation.safety.results import Arm
from trimtab.evaluation.utility import report
from trimtab.evaluation.utility.metrics import Measured, marked
from trimtab.jobs.evaluate import variants
from trimtab.jobs.evaluate.arm_cache import Store
from trimtab.jobs.evaluate.config import UtilityConfig, UtilitySuite
from trimtab.jobs.runtime.cluster import joined, run_task
from trimtab.jobs.runtime.config import sources
from trimtab.judges.answer_matching import wanted_number
from trimtab.loading import find
from trimtab.model import base_model
from trimtab.model.base_model import BaseModel
from trimtab.types import AnswerKind, Precision

SHORT, LONG = 32, 320


@dataclass(frozen=True)
class Suite:
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
            {"name": f"{name} {what}", "digest": rows.digest(prompts), "rows": len(prompts)}
            for what, prompts in given.items()
            if prompts
        ]


def evaluate(config: UtilityConfig) -> list[Measured]:
    """What every arm reached. Raises errors of ours for data and prefixes that cannot be used."""
    base = base_model.resolve(config.base, config.revision)
    suites = {"suite": load(config, "suite")}
    chosen = {name: prefix for spec in sources(config.prefix) for name, prefix in find(spec, base).items()}
    folder = settings.home() / "utility" / base.fingerprint
    with joined(config.address):
        return measure(base, variants.standard_arms(chosen), suites, config.precision, config.gpus, folder)["suite"]


def command(config: UtilityConfig) -> dict[str, Any]:
    """Print the table; write all answers where asked to."""
    measured = evaluate(config)
    for table in report.tables(measured, config.base):
        console.print(table)
    pooled = report.as_json(measured, answers=False)
    for arm in pooled["pooled"]:
        if len(arm.get("sets", {})) > 1:
            shown = ", ".join(f"{name} {rate['value']:.2f} of {rate['count']}" for name, rate in arm["sets"].items())
            say(f"{arm['arm']}: right on {shown}")
    if config.answers:
        Path(config.answers).write_text(json.dumps(report.as_json(measured), indent=1) + "\n")
    return pooled


def load(suite: UtilitySuite, name: str) -> Suite:
    """Read a suite's data. Raises UsageError, naming what cannot be read or compared."""
    known = {*questions.FIELDS, *texts.FIELDS}
    if unknown := set(suite.columns) - known:
        raise UsageError(f"utility {name}: columns may rename {', '.join(sorted(known))}, not {', '.join(sorted(unknown))}")
    asked = questions.read_all(_given(suite.questions), _of(suite.columns, questions.FIELDS))
    read = texts.read_all(_given(suite.texts), _of(suite.columns, texts.FIELDS))
    asked = [replace(q, kind=suite.kind or q.kind or "contains") for q in asked]
    for question in asked:
        _check(question)
    kinds: set[AnswerKind | None] = {q.kind for q in asked}
    return Suite(
        questions=[asked[i] for i in _limited([q.question for q in asked], suite.limit)],
        texts=[read[i] for i in _limited([t.target or "" for t in read], suite.limit)],
        max_tokens=suite.max_tokens or (LONG if "numeric" in kinds else SHORT),
        longest=suite.longest,
    )


def measure(
    base: BaseModel, asked: Sequence[Arm], suites: Mapping[str, Suite], precision: Precision, gpus: float, folder: Path
) -> dict[str, list[Measured]]:
    """What every arm reached on every suite; what is kept in `folder` is neither asked nor read again."""
    asking = {
        name: Store(folder, base.fingerprint, [q.prompt for q in suite.questions], suite.max_tokens, precision)
        for name, suite in suites.items()
        if suite.questions
    }
    reading = {name: Store(folder, base.fingerprint, s.texts, s.longest, precision) for name, s in suites.items() if s.texts}
    variants.keep_answers("answers to questions", base, asked, list(asking.values()), gpus)
    _read(base, asked, reading, precision, gpus)

    def measured(name: str, arm: Arm) -> Measured:
        said = asking[name].answers(arm) if name in asking else []
        read = reading[name].readings(arm) if name in reading else []
        return Measured(arm.name, [marked(q, a) for q, a in zip(suites[name].questions, said or [], strict=True)], read or [])

    return {name: [measured(name, arm) for arm in asked] for name in suites}


def _read(base: BaseModel, asked: Sequence[Arm], stores: Mapping[str, Store], precision: Precision, gpus: float) -> None:
    """Read what is not kept yet."""
    missing = {name: [arm for arm in asked if store.readings(arm) is None] for name, store in stores.items()}
    wanted = {name: (those, stores[name].prompts, stores[name].limit) for name, those in missing.items() if those}
    if not wanted:
        return
    task, device = "trimtab.jobs.evaluate.utility_task:read", "cuda" if gpus else "cpu"
    found = run_task("texts read", task, base, wanted, precision, device, cpus=ray_connection.cores(), gpus=gpus)
    for name, (those, _, _) in wanted.items():
        for arm, readings in zip(those, found[name], strict=True):
            stores[name].put_readings(arm, readings)


def _given(several: list[str] | str) -> list[str]:
    return sources(several) if several else []


def _of(columns: Mapping[str, str], fields: Sequence[str]) -> dict[str, str]:
    return {field: column for field, column in columns.items() if field in fields}


def _check(question: Question) -> None:
    """UsageError where numbers are to be compared and a wanted answer has none."""
    if question.kind == "numeric":
        for wanted in question.answers:
            wanted_number(wanted)


def _limited(named: Sequence[str], limit: int) -> list[int]:
    """Indices of at most `limit`, chosen by a hash so that more data changes little; 0 takes all."""
    order = sorted(range(len(named)), key=lambda i: fraction(named[i], 0))
    return sorted(order[: limit or len(named)])
