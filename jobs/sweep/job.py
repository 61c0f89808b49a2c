"""`trimtab sweep`: search settings of the align job with Ray Tune, then judge and register the prefix of the best trial.

trimtab sweep --config jobs/configs/sweep.yaml

Trials are compared by validation loss alone; the test part is looked at once, for the winner. A sweep that was stopped goes on,
and one that is done takes more trials.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from trimtab import settings
from trimtab.cli import main
from trimtab.cli.console import console, print_line
from trimtab.errors import InterruptedByUserError, JobError, UsageError
from trimtab.jobs.align.config import PARTED_BY, AlignConfig
from trimtab.jobs.align.dataset import PreparedDataset, build_run_identity, prepare_many, read_raw_dataset
from trimtab.jobs.align.job import check_config, complete_run
from trimtab.jobs.runtime.cluster import ray_session
from trimtab.jobs.runtime.run_state import create_or_resume_run, read_run_record
from trimtab.jobs.sweep.asha import METRIC
from trimtab.jobs.sweep.config import SweepConfig, draw_settings
from trimtab.jobs.sweep.trials import Trial, TrialSearch, run_trials
from trimtab.model.base_model import BaseModel, resolve_base_model
from trimtab.tracking import runs
from trimtab.tracking.runs import TrackedRun
from trimtab.util.atomic_files import exclusive_lock

# Trials are compared by their losses on the same rows, and share what runs them: these are no settings to search.
COMMON = ("name", "base", "revision", "resume", "register", "evaluate", "gate", "scale")
COMMON_DATA = tuple(f"data.{name}" for name in PARTED_BY)
COMMON_TRAIN = ("train.longest", "train.precision", "train.validate_every", "train.validation_rows")


@dataclass(frozen=True)
class SweepResult:
    """Trials, the best first, and what `trimtab align` made of the best one, as for `--json`."""

    folder: Path
    trials: list[Trial]
    winner: dict[str, Any]


def search_settings(config: SweepConfig) -> SweepResult:
    """Run the trials that are missing, then judge and register the best. Raises errors of ours, Interrupted on Ctrl-C."""
    folder = settings.get_runs_folder() / f"sweep-{config.name}"
    planned = plan_trials(config, folder)
    first = planned[0].config
    print_line(f"base model {first.base}, and the prompts (the first time they are downloaded)")
    base = resolve_base_model(first.base, first.revision)
    _unchanged(config, planned, base, folder)
    best_first = rank_trials(planned)
    if all(t.ended for t in planned) and (judged := _judged(best_first, folder)):
        print_line(f"all {len(planned)} trials are done")
        return _told(SweepResult(folder, best_first, judged))
    folder.mkdir(parents=True, exist_ok=True)
    with exclusive_lock(folder), ray_session(config.address):
        prepared = _prepare(config, planned, base)
        parent = _parent(config, folder)
        with runs.close_run(parent):
            failed = run_trials(config, TrialSearch(planned, prepared, base, parent.run_id), folder)
            best_first = rank_trials(planned)
            if not best_first:
                raise next(iter(failed.values()), JobError(f"no trial of {config.name} came to a validation"))
            (folder / "trials.json").write_text(json.dumps([_row(t) for t in best_first], indent=1) + "\n")
            parent.log_artifacts(folder / "trials.json")
            best = best_first[0]
            winner = _judged(best_first, folder) or _complete(best, base, prepared[best.number], parent, folder)
    return _told(SweepResult(folder, best_first, winner))


def run_sweep(config: SweepConfig) -> dict[str, Any]:
    """`trimtab sweep`."""
    result = search_settings(config)
    return {"folder": str(result.folder), "trials": [_row(t) for t in result.trials], "winner": result.winner}


def plan_trials(config: SweepConfig, folder: Path) -> list[Trial]:
    """All trials. Raises UsageError for settings that `trimtab align` does not know or take, and such as trials must share."""
    shared = runs.flatten_settings(config.shared) | {"name": config.name}
    common = _settings(shared, "shared")
    if not common.train.validate_every:
        raise UsageError("a sweep compares validation losses: set train.validate_every in shared above 0")
    planned: list[Trial] = []
    for number, chosen in enumerate(draw_settings(config)):
        made = _settings(shared | runs.flatten_settings(chosen), f"trial {number} ({_text(chosen)})")
        if different := [key for key, value in _common(made).items() if value != _common(common).get(key)]:
            raise UsageError(f"space.{different[0]}: all trials must have the same, to be compared; set it in shared")
        check_config(made)
        planned.append(Trial(number, chosen, made, folder / f"trial-{number:03d}"))
    return planned


def rank_trials(planned: Sequence[Trial]) -> list[Trial]:
    """Trials by their lowest validation loss, the best first, without those that have none.

    At the rung of one that was stopped early, another had a lower loss. Should it lead nevertheless, as that one failed later,
    it is trained to its end before it is judged.
    """
    seen = [(t.loss, t.number, t) for t in planned]
    return [t for _, _, t in sorted((loss, number, t) for loss, number, t in seen if loss is not None)]


def _settings(values: dict[str, Any], where: str) -> AlignConfig:
    made: AlignConfig = main.build_settings(AlignConfig, values, where)
    # A trial is judged, and can be gone on with, whenever it validates.
    return replace(made, train=replace(made.train, checkpoint_every=made.train.validate_every or made.train.steps))


def _common(config: AlignConfig) -> dict[str, Any]:
    """What all trials must have in common, by dotted names."""
    every = runs.flatten_settings(asdict(config))
    return {k: v for k, v in every.items() if k.partition(".")[0] in COMMON or k in (*COMMON_DATA, *COMMON_TRAIN)}


def _unchanged(config: SweepConfig, planned: Sequence[Trial], base: BaseModel, folder: Path) -> None:
    """Raise UsageError where trials of this name have begun with other settings, weights or data."""
    for trial in planned:
        if not (known := read_run_record(trial.folder)):
            continue
        before = runs.flatten_settings(known.config)
        now = runs.flatten_settings(build_run_identity(trial.config, base, read_raw_dataset(trial.config, base).inputs))
        if changed := sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key)):
            raise UsageError(
                f"the sweep {config.name!r} was begun with other settings or data ({', '.join(changed)}): give the same ones, "
                f"name it otherwise, or remove {folder}"
            )


def _prepare(config: SweepConfig, planned: Sequence[Trial], base: BaseModel) -> list[PreparedDataset]:
    """Rows of each trial to learn from; rows and prompts to be judged on are those of the shared settings."""
    shared = _settings(runs.flatten_settings(config.shared) | {"name": config.name}, "shared")
    common = replace(planned[0].config, data=shared.data, targets=shared.targets)
    made = prepare_many({"shared": common} | {str(t.number): t.config for t in planned}, base)
    judged = made["shared"]
    return [replace(made[str(t.number)], validation=judged.validation, parts=judged.parts) for t in planned]


def _parent(config: SweepConfig, folder: Path) -> TrackedRun:
    run = create_or_resume_run(folder, f"sweep {config.name}", "sweep")
    run.log_params({"sweep": {"space": config.space, "reduction": config.reduction, "seed": config.seed}})
    return run


def _judged(best_first: Sequence[Trial], folder: Path) -> dict[str, Any] | None:
    """What an earlier call made of the best trial, where that is the one that it judged."""
    path = folder / "winner.json"
    kept = json.loads(path.read_text()) if path.exists() else None
    return kept if kept and best_first and kept["trial"] == best_first[0].number else None


def _complete(best: Trial, base: BaseModel, prepared: PreparedDataset, parent: TrackedRun, folder: Path) -> dict[str, Any]:
    """Judge, gate and register the best trial's prefix, in its own folder and MLflow run."""
    print_line(f"best: trial {best.number} ({_text(best.chosen)}); its prefix is judged and registered")
    parent.set_tags({"trimtab.winner": str(best.run_id)})
    run = best.join(parent.run_id, build_run_identity(best.config, base, prepared.inputs))
    try:
        result = complete_run(best.config, base, prepared, run, best.folder)
    except InterruptedByUserError as error:
        raise InterruptedByUserError("stopped; all trials are done, the same command goes on") from error
    winner = {"trial": best.number, **result.as_json()}
    (folder / "winner.json").write_text(json.dumps(winner, indent=1) + "\n")
    return winner


def _told(result: SweepResult) -> SweepResult:
    table = Table(title="trials", title_justify="left")
    for column in ("trial", "validation loss", "steps", "settings"):
        table.add_column(column)
    for t in result.trials:
        table.add_row(str(t.number), f"{t.loss:.3f}", f"{t.step} of {t.config.train.steps}", _text(t.chosen))
    console.print(table)
    print_line(f"prefix: {result.winner['folder']}/prefix   trials: {result.folder / 'trials.json'}")
    return result


def _row(trial: Trial) -> dict[str, Any]:
    return {
        "trial": trial.number,
        "settings": dict(trial.chosen),
        METRIC: trial.loss,
        "step": trial.step,
        "steps": trial.config.train.steps,
        "run_id": trial.run_id,
    }


def _text(chosen: Any) -> str:
    return ", ".join(f"{key} {value}" for key, value in chosen.items())
