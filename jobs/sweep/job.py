"""Job of `trimtab sweep`: search of training settings with Ray Tune and registration of the best prefix.

trimtab sweep --config jobs/configs/sweep.yaml

Validation loss alone ranks the trials; only the winner is evaluated on the test part. An interrupted sweep can be resumed, and
a finished one can be extended by trials.
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
from trimtab.errors import ArtifactError, InterruptedByUserError, JobError, UsageError
from trimtab.jobs.align.config import PARTED_BY, AlignConfig
from trimtab.jobs.align.dataset import PreparedDataset, build_run_identity, prepare_many, read_raw_dataset
from trimtab.jobs.align.job import check_config, complete_run
from trimtab.jobs.runtime.cluster import ray_session
from trimtab.jobs.runtime.run_state import check_run_version, create_or_resume_run, read_run_record
from trimtab.jobs.sweep.asha import METRIC
from trimtab.jobs.sweep.config import SweepConfig, draw_settings
from trimtab.jobs.sweep.trials import Trial, TrialSearch, run_trials
from trimtab.model.base_model import BaseModel, resolve_base_model
from trimtab.tracking import runs
from trimtab.tracking.runs import TrackedRun
from trimtab.util.atomic_files import exclusive_lock, write_atomic
from trimtab.util.json_files import read_json_object

# Settings that cannot be searched: trials are compared by their losses on the same rows, and share the hardware.
COMMON = ("name", "base", "revision", "resume", "register", "evaluate", "gate", "scale")
COMMON_DATA = tuple(f"data.{name}" for name in PARTED_BY)
COMMON_TRAIN = ("train.max_target_tokens", "train.dtype", "train.validate_every", "train.validation_rows")


@dataclass(frozen=True)
class SweepResult:
    """Result of a sweep.

    Attributes:
        folder: folder of the sweep.
        trials: trials with a validation, best first.
        winner: result of `trimtab align` for the best trial, as JSON values.
    """

    folder: Path
    trials: list[Trial]
    winner: dict[str, Any]


def search_settings(config: SweepConfig) -> SweepResult:
    """Run the missing trials, then evaluate and register the best one.

    Returns:
        Ranked trials and the result of the best one.

    Raises:
        TrimtabError: if the settings are invalid, or no trial reached a validation.
        InterruptedByUserError: on Ctrl-C.
    """
    folder = settings.get_runs_folder() / f"sweep-{config.name}"
    trials = plan_trials(config, folder)
    first = trials[0].config
    print_line(f"base model {first.base}, and the prompts (downloaded and converted at the first use)")
    base = resolve_base_model(first.base, first.revision)
    _check_unchanged(config, trials, base, folder)
    ranked = rank_trials(trials)
    if all(t.ended for t in trials) and (winner := _read_winner(ranked, folder)):
        print_line(f"all {len(trials)} trials are done")
        return _print_result(SweepResult(folder, ranked, winner))
    folder.mkdir(parents=True, exist_ok=True)
    with exclusive_lock(folder), ray_session(config.address):
        prepared = _prepare(config, trials, base)
        parent = _start_parent_run(config, folder)
        with runs.close_run(parent):
            failed = run_trials(config, TrialSearch(trials, prepared, base, parent.run_id), folder)
            ranked = rank_trials(trials)
            if not ranked:
                raise next(iter(failed.values()), JobError(f"no trial of {config.name} reached a validation"))
            (folder / "trials.json").write_text(json.dumps([_trial_as_json(t) for t in ranked], indent=1) + "\n")
            parent.log_artifacts(folder / "trials.json")
            best = ranked[0]
            winner = _read_winner(ranked, folder) or _complete_best(best, base, prepared[best.number], parent, folder)
    return _print_result(SweepResult(folder, ranked, winner))


def run_sweep(config: SweepConfig) -> dict[str, Any]:
    """Run `trimtab sweep`.

    Returns:
        Folder, ranked trials and winner as JSON values.
    """
    result = search_settings(config)
    return {"folder": str(result.folder), "trials": [_trial_as_json(t) for t in result.trials], "winner": result.winner}


def plan_trials(config: SweepConfig, folder: Path) -> list[Trial]:
    """Return all trials of a sweep.

    Args:
        config: settings of the sweep.
        folder: folder of the sweep.

    Raises:
        UsageError: if `trimtab align` does not accept the settings of a trial, or trials differ in settings that must be the
            same for all.
    """
    shared = runs.flatten_settings(config.shared) | {"name": config.name}
    shared_config = _build_trial_config(shared, "shared")
    if not shared_config.train.validate_every:
        raise UsageError("a sweep needs validation losses: set train.validate_every in shared above 0")
    common = _select_common(shared_config)
    trials: list[Trial] = []
    for number, chosen in enumerate(draw_settings(config)):
        values = shared | runs.flatten_settings(chosen)
        trial_config = _build_trial_config(values, f"trial {number} ({_format_settings(chosen)})")
        if different := [key for key, value in _select_common(trial_config).items() if value != common.get(key)]:
            raise UsageError(
                f"param_space.{different[0]}: all trials must have the same value to be comparable. Set it in shared"
            )
        check_config(trial_config)
        trials.append(Trial(number, chosen, trial_config, folder / f"trial-{number:03d}"))
    return trials


def rank_trials(trials: Sequence[Trial]) -> list[Trial]:
    """Return the trials with a validation by increasing lowest validation loss.

    A trial that was stopped early had a higher loss than another trial at the same rung. It can still rank first if that trial
    failed later; its training is then completed before the evaluation.
    """
    losses = [(t.loss, t.number, t) for t in trials]
    return [t for _, _, t in sorted((loss, number, t) for loss, number, t in losses if loss is not None)]


def _build_trial_config(values: dict[str, Any], where: str) -> AlignConfig:
    config: AlignConfig = main.build_settings(AlignConfig, values, where)
    # A checkpoint at every validation, so that the trial can be resumed or completed from there.
    return replace(config, train=replace(config.train, checkpoint_every=config.train.validate_every or config.train.max_steps))


def _select_common(config: AlignConfig) -> dict[str, Any]:
    """Return the settings that all trials must share, by dotted name."""
    values = runs.flatten_settings(asdict(config))
    return {k: v for k, v in values.items() if k.partition(".")[0] in COMMON or k in (*COMMON_DATA, *COMMON_TRAIN)}


def _check_unchanged(config: SweepConfig, trials: Sequence[Trial], base: BaseModel, folder: Path) -> None:
    """Raise UsageError if existing trials of this name have other settings, weights or data."""
    for trial in trials:
        if not (record := read_run_record(trial.folder)):
            continue
        check_run_version(record, trial.folder)
        old = runs.flatten_settings(record.config)
        new = runs.flatten_settings(
            build_run_identity(trial.config.identity(), base, read_raw_dataset(trial.config, base).inputs)
        )
        if changed := sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key)):
            raise UsageError(
                f"the sweep {config.name!r} was started with other settings or data ({', '.join(changed)}). Use the same ones, "
                f"choose another name, or remove {folder}"
            )


def _prepare(config: SweepConfig, trials: Sequence[Trial], base: BaseModel) -> list[PreparedDataset]:
    """Return the rows of each trial; validation rows and evaluation prompts are those of the shared settings."""
    shared = _build_trial_config(runs.flatten_settings(config.shared) | {"name": config.name}, "shared")
    common = replace(trials[0].config, data=shared.data, targets=shared.targets)
    datasets = prepare_many({"shared": common} | {str(t.number): t.config for t in trials}, base)
    evaluated = datasets["shared"]
    return [replace(datasets[str(t.number)], validation=evaluated.validation, parts=evaluated.parts) for t in trials]


def _start_parent_run(config: SweepConfig, folder: Path) -> TrackedRun:
    run = create_or_resume_run(folder, f"sweep {config.name}", "sweep")
    run.log_params(
        {"sweep": {"param_space": config.param_space, "reduction_factor": config.reduction_factor, "seed": config.seed}}
    )
    return run


def _read_winner(ranked: Sequence[Trial], folder: Path) -> dict[str, Any] | None:
    """Return the stored winner of an earlier call; None if it is not the best trial."""
    path = folder / "winner.json"
    try:
        stored = read_json_object(path, "a sweep's winner")
    except ArtifactError:
        # Missing, or damaged by a full disk: the best trial is completed again.
        return None
    return stored if ranked and stored.get("trial") == ranked[0].number else None


def _complete_best(best: Trial, base: BaseModel, prepared: PreparedDataset, parent: TrackedRun, folder: Path) -> dict[str, Any]:
    """Evaluate, gate and register the prefix of the best trial in the folder and MLflow run of the trial."""
    print_line(f"best: trial {best.number} ({_format_settings(best.chosen)}); evaluating and registering its prefix")
    parent.set_tags({"trimtab.winner": str(best.run_id)})
    run = best.join(parent.run_id, build_run_identity(best.config.identity(), base, prepared.inputs))
    try:
        result = complete_run(best.config, base, prepared, run, best.folder)
    except InterruptedByUserError as error:
        raise InterruptedByUserError("stopped; all trials are done. Run the same command to resume") from error
    winner = {"trial": best.number, **result.as_json()}
    write_atomic(folder / "winner.json", json.dumps(winner, indent=1) + "\n")
    return winner


def _print_result(result: SweepResult) -> SweepResult:
    table = Table(title="trials", title_justify="left")
    for column in ("trial", "validation loss", "steps", "settings"):
        table.add_column(column)
    for t in result.trials:
        table.add_row(str(t.number), f"{t.loss:.3f}", f"{t.step} of {t.config.train.max_steps}", _format_settings(t.chosen))
    console.print(table)
    print_line(f"prefix: {result.winner['folder']}/prefix   trials: {result.folder / 'trials.json'}")
    return result


def _trial_as_json(trial: Trial) -> dict[str, Any]:
    return {
        "trial": trial.number,
        "settings": dict(trial.chosen),
        METRIC: trial.loss,
        "step": trial.step,
        "steps": trial.config.train.max_steps,
        "run_id": trial.run_id,
    }


def _format_settings(chosen: Any) -> str:
    return ", ".join(f"{key} {value}" for key, value in chosen.items())
