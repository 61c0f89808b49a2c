"""Job of `trimtab judges`: agreement of judges with human labels; with --fit, training of a classifier.

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
    """Measure the string match, and the configured or newly fitted judge, against human labels.

    Returns:
        Agreement of each judge with the labels, the string match first.

    Raises:
        TrimtabError: if labels or a judge cannot be used, or the job fails.
    """
    standings = [compute_standing(StringMatch())]
    if config.fit:
        folder = Path(config.fit)
        user_labels = [row for file in as_source_list(config.labels) for row in read_label_file(Path(file))]
        base = resolve_base_model(config.base, config.revision)
        with ray_session(config.address):
            save_head(
                _fit(
                    config,
                    base,
                    FitRequest(read_human_labels(), user_labels, config.max_answer_tokens, config.dtype, _get_device(config)),
                ),
                folder,
            )
        standings.append(compute_standing(open_judge(JudgeConfig("classifier", str(folder)), base)))
    if config.judge.kind == "classifier":
        standings.append(compute_standing(open_judge(config.judge, resolve_base_model(config.base, config.revision))))
    if config.judge.kind == "endpoint":
        standings.append(compute_standing(build_refusal_judge(config.judge)))
    return standings


def run_judges(config: JudgesConfig) -> dict[str, Any]:
    """Measure judges and print one table per set of labels.

    Returns:
        Agreements of the judges, for `--json`.
    """
    standings = measure_judges(config)
    for on in dict.fromkeys(a.on for s in standings for a in s.agreements):
        console.print(build_table(standings, on))
    for note in dict.fromkeys(f"{s.judge}: {s.note}" for s in standings if s.note):
        print_line(note)
    if config.fit:
        print_line(f"classifier: {config.fit}; use it with --judge.kind classifier --judge.folder {config.fit}")
    return {"judges": [s.as_json() for s in standings]}


def build_table(standings: Sequence[JudgeStanding], on: str) -> Table:
    """Build a table with one line per judge, with 95 % intervals.

    Args:
        standings: agreements of the judges.
        on: set of labels to show.
    """
    agreements = [(s.judge, a) for s in standings for a in s.agreements if a.on == on]
    table = Table(title=f"{agreements[0][1].count} {on}", title_justify="left")
    for column in ("judge", "precision", "recall", "accuracy"):
        table.add_column(column, no_wrap=column != "judge", overflow="fold")
    for name, a in agreements:
        table.add_row(name, str(a.precision), str(a.recall), str(a.accuracy))
    return table


def _fit(config: JudgesConfig, base: BaseModel, request: FitRequest) -> RefusalHead:
    task = "trimtab.jobs.judges.tasks:fit_refusal_head"
    return run_task("cross-validation of the classifier", task, base, request, cpus=get_max_node_cores(), gpus=config.num_gpus)


def _get_device(config: JudgesConfig) -> str:
    return "cuda" if config.num_gpus else "cpu"
