"""The align job: prompts -> targets -> hard filter -> Ray Train -> evaluation -> registry -> gate.

trimtab align --name mine --data.harmful harmful.jsonl --data.benign benign.csv --scale.workers 2
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from trimtab import objectives, settings
from trimtab.artifacts import prefix as prefixes
from trimtab.artifacts.prefix import Prefix
from trimtab.cli.console import console, say
from trimtab.engine.config import EngineConfig
from trimtab.errors import Interrupted, UsageError
from trimtab.evaluation.safety import report
from trimtab.evaluation.safety.results import ArmResult
from trimtab.jobs.align import dataset
from trimtab.jobs.align.config import AlignConfig
from trimtab.jobs.align.dataset import Prepared
from trimtab.jobs.align.driver import fit, learned
from trimtab.jobs.evaluate import variants
from trimtab.jobs.runtime import run_state
from trimtab.jobs.runtime.cluster import joined
from trimtab.model import base_model
from trimtab.model.base_model import BaseModel
from trimtab.tracking import registry, runs
from trimtab.tracking.promotions import enrolled
from trimtab.tracking.registry import Version
from trimtab.tracking.runs import Run
from trimtab.types import BASE_ARM, TEXT_ARM
from trimtab.util import atomic_files


@dataclass(frozen=True)
class AlignResult:
    """What an align run leaves: its folder (prefix/, test.jsonl, report.json, plane.png), its MLflow run, and its version
    where it was registered."""

    folder: Path
    run_id: str
    prefix: Prefix
    results: dict[str, list[ArmResult]]
    version: Version | None
    champion: bool

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "folder": str(self.folder),
            "run_id": self.run_id,
            "name": self.prefix.card.name,
            "version": self.version.version if self.version else None,
            "champion": self.champion,
            "results": {part: report.as_json(results, answers=False) for part, results in self.results.items()},
        }


def align(config: AlignConfig) -> AlignResult:
    """Learn a prefix, judge it and register it. Raises errors of ours for what the user can mend, Interrupted on Ctrl-C."""
    check(config)
    say(f"base model {config.base}, and the prompts (the first time they are downloaded)")
    base = base_model.resolve(config.base, config.revision)
    given = dataset.read(config, base)
    identity = dataset.identity(config, base, given.inputs)
    folder = _folder(config, identity)
    with atomic_files.alone(folder), joined(config.scale.address):
        prepared = dataset.prepare(config, base, given)
        run = run_state.join(folder, config.name, "align", config=identity)
        return complete(config, base, prepared, run, folder)


def check(config: AlignConfig) -> None:
    """Raise UsageError for what would otherwise end the job in its midst: an objective's options, a name."""
    objective = objectives.get(config.objective)
    try:
        objective(**config.objective_options)
    except TypeError as error:
        raise UsageError(f"objective {config.objective}: {str(error).split('__init__() ')[-1]}") from error
    registry.model_name("base", config.name)


def complete(config: AlignConfig, base: BaseModel, prepared: Prepared, run: Run, folder: Path) -> AlignResult:
    """All steps from the rows on; training goes on from the newest checkpoint in `folder`. The run ends with them.

    Raises errors of ours, Interrupted on Ctrl-C.
    """
    with runs.closing(run):
        dataset.write(prepared, folder)
        return _steps(config, base, prepared, run, folder)


def command(config: AlignConfig) -> dict[str, Any]:
    """`trimtab align`."""
    result = align(config)
    say(
        f"prefix: {result.folder / 'prefix'}   report: {result.folder / 'report.json'}   picture: {result.folder / 'plane.png'}"
    )
    return result.as_json()


def _steps(config: AlignConfig, base: BaseModel, prepared: Prepared, run: Run, folder: Path) -> AlignResult:
    run.params({"config": asdict(config), "base_fingerprint": base.fingerprint})
    run.inputs(prepared.inputs, "training")
    run.artifacts(folder / "filter.json", "data")
    run.artifacts(folder / "removed.jsonl", "data")
    run.artifacts(folder / "test.jsonl", "data")
    fitted = fit(config, base, prepared, run, folder)
    if fitted.stopped:
        raise Interrupted(
            f"stopped after step {fitted.state.step} of {config.train.steps}, all of it kept: "
            "the same command with --resume goes on"
        )
    draft = learned(config, base, prepared, run, fitted)
    results = _evaluate(config, base, prepared, draft)
    prefix = learned(config, base, prepared, run, fitted, _metrics(config, results))
    prefixes.save(prefix, folder / "prefix")
    _report(config, results, run, folder)
    version, champion = _register(config, results, run, folder) if config.register else (None, False)
    (folder / "done").touch()
    return AlignResult(folder, run.run_id, prefix, results, version, champion)


def _folder(config: AlignConfig, identity: Mapping[str, Any]) -> Path:
    """The run's folder: that of the newest unfinished run where it is resumed, else a new one."""
    parent = settings.runs() / config.name
    begun = (f for f in parent.glob("*") if (f / run_state.FILE).exists() and not (f / "done").exists())
    unfinished = max(begun, default=None)
    if config.resume and unfinished and (known := run_state.known(unfinished)):
        before = runs.flatten(known.config)
        changed = sorted(k for k, v in runs.flatten(identity).items() if before.get(k) != v)
        if not changed:
            return unfinished
        if config.resume is True:
            raise UsageError(
                f"the unfinished run of {config.name!r} had other settings or data ({', '.join(changed)}): give the same ones"
            )
    if config.resume is True:
        raise UsageError(f"there is no unfinished run of {config.name!r} to resume; leave --resume out to begin one")
    folder = parent / datetime.now(UTC).strftime("%Y%m%d-%H%M%S-%f")
    folder.mkdir(parents=True)
    return folder


def _evaluate(config: AlignConfig, base: BaseModel, prepared: Prepared, prefix: Prefix) -> dict[str, list[ArmResult]]:
    """Every arm on the validation part (for the gate) and on the test part (for the report)."""
    candidates = {config.name: prefix}
    if (champion := registry.champion(base.name, config.name)) is not None:
        candidates[f"champion v{champion.version}"] = registry.load(champion, base)
    wanted = {part: prepared.parts[part] for part in ("validation", "test") if prepared.parts[part]}
    chosen = {part: variants.limited(prompts, config.evaluate.limit) for part, prompts in wanted.items()}
    engine = EngineConfig(rows=256, precision=config.train.precision, max_length=1024)
    return variants.evaluate(
        base, variants.standard_arms(candidates), chosen, config.evaluate.max_tokens, engine, config.scale.gpus
    )


def _metrics(config: AlignConfig, results: dict[str, list[ArmResult]]) -> dict[str, float]:
    """Figures for card and registry: the prefix, and the arms beside it."""
    metrics: dict[str, float] = {}
    for part, arm_results in results.items():
        for r in arm_results:
            if r.name == config.name:
                metrics |= {f"{part}_refusal": r.refusal.value, f"{part}_compliance": r.compliance.value}
                metrics[f"{part}_balanced"] = r.balanced.value
            elif r.name in (BASE_ARM, TEXT_ARM):
                metrics[f"{part}_balanced_{r.name.replace(' ', '_')}"] = r.balanced.value
    return metrics


def _report(config: AlignConfig, results: dict[str, list[ArmResult]], run: Run, folder: Path) -> None:
    (folder / "report.json").write_text(json.dumps({p: report.as_json(r) for p, r in results.items()}, indent=1))
    shown = "test" if "test" in results else "validation"
    drawn = report.plane(results[shown], folder / "plane.png")
    console.print(report.table(results[shown], f"{config.name} on prompts never trained on ({shown} part)"))
    run.metrics(_metrics(config, results), config.train.steps)
    run.artifacts(folder / "report.json", "evaluation")
    if drawn:
        run.artifacts(folder / "plane.png", "evaluation")


def _register(config: AlignConfig, results: dict[str, list[ArmResult]], run: Run, folder: Path) -> tuple[Version, bool]:
    passed, reason = gate(config, results["validation"])
    version = enrolled(folder / "prefix", run, passed, reason)
    say(f"registered {config.name} version {version.version} as candidate; gate: {reason}")
    return version, passed


def gate(config: AlignConfig, results: list[ArmResult]) -> tuple[bool, str]:
    """Whether the prefix may become champion, and why, from its results on the validation part."""
    mine = next(r for r in results if r.name == config.name)
    rival = max((r for r in results if r.name != config.name), key=lambda r: r.balanced.value)
    gain = mine.balanced.value - rival.balanced.value
    if mine.compliance.value < config.gate.compliance:
        return False, f"helps with {mine.compliance.value:.2f} of benign prompts, below {config.gate.compliance:.2f}"
    # Also where there is nothing to compare.
    if not gain > config.gate.gain:
        above = f"{rival.name} ({rival.balanced.value:.2f}) by {config.gate.gain:.2f}"
        return False, f"balanced {mine.balanced.value:.2f} is not above {above}"
    return True, f"balanced {mine.balanced.value:.2f}, {gain:+.2f} over {rival.name}; promoted to champion"
