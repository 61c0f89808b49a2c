"""`trimtab judges`: how each judge stands against human labels; with --fit, a classifier of your own base model.

trimtab judges --fit my-classifier
trimtab evaluate safety --data prompts.csv --judge.kind classifier --judge.folder my-classifier
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from trimtab.cli.console import console, print_line
from trimtab.jobs.judges.config import JudgeConfig, JudgesConfig
from trimtab.jobs.judges.runner import build_refusal_judge, compute_standing, open_judge
from trimtab.jobs.judges.tasks import FitRequest
from trimtab.jobs.runtime.cluster import ray_session, run_task
from trimtab.jobs.runtime.config import as_source_list
from trimtab.judges.human_agreement import JudgeStanding
from trimtab.judges.human_labels import read_human_labels, read_label_file
from trimtab.judges.refusal_head import RefusalHead, save_head
from trimtab.judges.string_match import StringMatch
from trimtab.model.base_model import BaseModel, resolve_base_model
from trimtab.ray_connection import get_max_node_cores


def measure_judges(config: JudgesConfig) -> list[JudgeStanding]:
    """How the string match, and the judge that the settings name or fit, stand against labels. Raises errors of ours."""
    found = [compute_standing(StringMatch())]
    if config.fit:
        folder = Path(config.fit)
        own = [row for file in as_source_list(config.labels) for row in read_label_file(Path(file))]
        base = resolve_base_model(config.base, config.revision)
        with ray_session(config.address):
            save_head(
                _fit(
                    config,
                    base,
                    FitRequest(read_human_labels(), own, config.tokens, config.precision, _device(config)),
                ),
                folder,
            )
        found.append(compute_standing(open_judge(JudgeConfig("classifier", str(folder)), base)))
    if config.judge.kind == "classifier":
        found.append(compute_standing(open_judge(config.judge, resolve_base_model(config.base, config.revision))))
    if config.judge.kind == "endpoint":
        found.append(compute_standing(build_refusal_judge(config.judge)))
    return found


def run_judges(config: JudgesConfig) -> dict[str, Any]:
    """Print the tables."""
    found = measure_judges(config)
    for on in dict.fromkeys(a.on for s in found for a in s.agreements):
        console.print(build_table(found, on))
    for note in dict.fromkeys(f"{s.judge}: {s.note}" for s in found if s.note):
        print_line(note)
    if config.fit:
        print_line(f"classifier: {config.fit}; use it with --judge.kind classifier --judge.folder {config.fit}")
    return {"judges": [s.as_json() for s in found]}


def build_table(found: Sequence[JudgeStanding], on: str) -> Table:
    """One line for each judge on one set of labels, with 95 % intervals."""
    mine = [(s.judge, a) for s in found for a in s.agreements if a.on == on]
    shown = Table(title=f"{mine[0][1].count} {on}", title_justify="left")
    for column in ("judge", "precision", "recall", "accuracy"):
        shown.add_column(column, no_wrap=column != "judge", overflow="fold")
    for name, a in mine:
        shown.add_row(name, str(a.precision), str(a.recall), str(a.accuracy))
    return shown


def _fit(config: JudgesConfig, base: BaseModel, lesson: FitRequest) -> RefusalHead:
    task = "trimtab.jobs.judges.tasks:fit_refusal_head"
    return run_task("cross-validation of the classifier", task, base, lesson, cpus=get_max_node_cores(), gpus=config.gpus)


def _device(config: JudgesConfig) -> str:
    return "cuda" if config.gpus else "cpu"
