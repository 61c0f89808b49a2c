"""`trimtab judges`: how each judge stands against human labels; with --fit, a classifier of your own base model.

trimtab judges --fit my-classifier
trimtab evaluate safety --data prompts.csv --judge.kind classifier --judge.folder my-classifier
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from trimtab import ray_connection
from trimtab.cli.console import console, say
from trimtab.jobs.judges.config import JudgeConfig, JudgesConfig
from trimtab.jobs.judges.runner import endpoint, opened, standing
from trimtab.jobs.judges.tasks import Lesson
from trimtab.jobs.runtime.cluster import joined, run_task
from trimtab.jobs.runtime.config import sources
from trimtab.judges import human_labels, refusal_head
from trimtab.judges.human_agreement import Standing
from trimtab.judges.refusal_head import Head
from trimtab.judges.string_match import StringMatch
from trimtab.model import base_model
from trimtab.model.base_model import BaseModel


def judges(config: JudgesConfig) -> list[Standing]:
    """How the string match, and the judge that the settings name or fit, stand against labels. Raises errors of ours."""
    found = [standing(StringMatch())]
    if config.fit:
        folder = Path(config.fit)
        own = [row for file in sources(config.labels) for row in human_labels.read_file(Path(file))]
        base = base_model.resolve(config.base, config.revision)
        with joined(config.address):
            refusal_head.save(
                _fit(config, base, Lesson(human_labels.read(), own, config.tokens, config.precision, _device(config))), folder
            )
        found.append(standing(opened(JudgeConfig("classifier", str(folder)), base)))
    if config.judge.kind == "classifier":
        found.append(standing(opened(config.judge, base_model.resolve(config.base, config.revision))))
    if config.judge.kind == "endpoint":
        found.append(standing(endpoint(config.judge)))
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
    task = "trimtab.jobs.judges.tasks:fit_head"
    return run_task("cross-validation of the classifier", task, base, lesson, cpus=ray_connection.cores(), gpus=config.gpus)


def _device(config: JudgesConfig) -> str:
    return "cuda" if config.gpus else "cpu"
