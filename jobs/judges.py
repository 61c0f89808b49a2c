"""`trimtab judges`: how each judge stands against human labels; with --fit, a classifier of your own base model.

trimtab judges --fit my-classifier
trimtab evaluate safety --data prompts.csv --judge.kind classifier --judge.folder my-classifier
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from trimtab import base as bases
from trimtab import nodes
from trimtab.base import BaseModel
from trimtab.console import console, say
from trimtab.judges import head, labels
from trimtab.judges.agreement import Standing
from trimtab.judges.head import Head
from trimtab.judges.refusal import StringMatch

from . import judging
from .cluster import joined, run_task
from .config import sources
from .judge_config import JudgeConfig, JudgesConfig
from .judge_tasks import Lesson


def judges(config: JudgesConfig) -> list[Standing]:
    """How the string match, and the judge that the settings name or fit, stand against labels. Raises errors of ours."""
    found = [judging.standing(StringMatch())]
    if config.fit:
        folder = Path(config.fit)
        own = [row for file in sources(config.labels) for row in labels.read_file(Path(file))]
        base = bases.resolve(config.base, config.revision)
        with joined(config.address):
            head.save(_fit(config, base, Lesson(labels.read(), own, config.tokens, config.precision, _device(config))), folder)
        found.append(judging.standing(judging.opened(JudgeConfig("classifier", str(folder)), base)))
    if config.judge.kind == "classifier":
        found.append(judging.standing(judging.opened(config.judge, bases.resolve(config.base, config.revision))))
    if config.judge.kind == "endpoint":
        found.append(judging.standing(judging.endpoint(config.judge)))
    return found


def command(config: JudgesConfig) -> dict[str, Any]:
    """Print the tables."""
    found = judges(config)
    for on in dict.fromkeys(a.on for s in found for a in s.agreements):
        console.print(table(found, on))
    for note in dict.fromkeys(f"{s.judge}: {s.note}" for s in found if s.note):
        say(note)
    if config.fit:
        say(f"classifier: {config.fit}; use it with --judge.kind classifier --judge.folder {config.fit}")
    return {"judges": [s.as_json() for s in found]}


def table(found: Sequence[Standing], on: str) -> Table:
    """One line for each judge on one set of labels, with 95 % intervals."""
    mine = [(s.judge, a) for s in found for a in s.agreements if a.on == on]
    shown = Table(title=f"{mine[0][1].count} {on}", title_justify="left")
    for column in ("judge", "precision", "recall", "accuracy"):
        shown.add_column(column, no_wrap=column != "judge", overflow="fold")
    for name, a in mine:
        shown.add_row(name, str(a.precision), str(a.recall), str(a.accuracy))
    return shown


def _fit(config: JudgesConfig, base: BaseModel, lesson: Lesson) -> Head:
    task = "trimtab.jobs.judge_tasks:fit_head"
    return run_task("cross-validation of the classifier", task, base, lesson, cpus=nodes.cores(), gpus=config.gpus)


def _device(config: JudgesConfig) -> str:
    return "cuda" if config.gpus else "cpu"
