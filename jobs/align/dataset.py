"""Dataset pipeline of the align job.

Prompts are read, split, balanced by form, completed with targets and filtered.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import zip_longest
from math import ceil
from pathlib import Path
from typing import Any

from trimtab import objectives
from trimtab.artifacts.card import PrefixCondition
from trimtab.cli.console import print_line
from trimtab.data.hard_filter import FilterContext, FilterResult, TrainingRow, apply_hard_filter
from trimtab.data.prompt import Prompt, compute_prompts_digest, hash_to_fraction, split_prompts, write_prompts
from trimtab.data.question_form import balance_forms, compute_predictability
from trimtab.data.readers import read_all_prompts
from trimtab.engine.config import EngineConfig
from trimtab.errors import UsageError
from trimtab.jobs.align.config import AUTO, AlignConfig, DataConfig
from trimtab.jobs.align.targets import Diagnosis, fill_targets
from trimtab.jobs.evaluate.conditions import ConditionedPrompts, judge_prompts, resolve_condition
from trimtab.jobs.runtime.config import as_source_list
from trimtab.model.base_model import BaseModel
from trimtab.model.chat_template import build_renderer
from trimtab.stats.intervals import Rate
from trimtab.types import LABELS, TARGET_ORIGINS, Label, Part, TargetOrigin

MIN_SIDE_PROMPTS = 120
# Neutral system messages: a prefix must also work beside the system message of a request.
SYSTEMS = (
    "You are a helpful assistant.",
    "Answer in plain English.",
    "You work for a small company and talk to its customers. Be friendly and brief.",
    "You are a careful assistant who explains things step by step.",
    "Answer the user's question.",
    "You are a knowledgeable tutor.",
)


@dataclass(frozen=True)
class RawDataset:
    """Prompts as read from their sources.

    Attributes:
        parts: prompts by part (train, validation, test).
        held_out: evaluation prompts that no training row may resemble.
        inputs: name, digest and number of rows of each source.
    """

    parts: dict[Part, list[Prompt]]
    held_out: list[str]
    inputs: list[dict[str, Any]]


@dataclass(frozen=True)
class PreparedDataset:
    """Filtered rows with targets, and the prompts of each part.

    Attributes:
        train: training rows.
        validation: rows for the validation loss.
        parts: prompts by part, on which answers are evaluated.
        filtered: result of the hard filter on the training rows.
        form: predictability of the class from the form alone, before and after balancing and filtering.
        inputs: name, digest and number of rows of each source.
        diagnosis: behavior of the frozen model on the prompts.
        condition: prompts that the prefix steers; None for all.
    """

    train: list[TrainingRow]
    validation: list[TrainingRow]
    parts: dict[Part, list[Prompt]]
    filtered: FilterResult
    form: tuple[float, float]
    inputs: list[dict[str, Any]]
    diagnosis: Diagnosis = field(default_factory=Diagnosis)
    condition: ConditionedPrompts | None = None


def read_raw_dataset(config: AlignConfig, base: BaseModel) -> RawDataset:
    """Read and split the prompts; needs no cluster.

    Raises:
        UsageError: if prompts cannot be read or are too few, or if the chat template does not support the prefix position.
    """
    build_renderer(base, config.num_virtual_tokens).insert_slot_tokens([{"role": "user", "content": "x"}], config.position, ())
    data = config.data
    parts, inputs = _read_and_split(config)
    held_out = [p.prompt for p in read_all_prompts(as_source_list(data.decontaminate_against), "benign_hard", data.columns)]
    return RawDataset(parts, held_out, inputs)


def prepare_dataset(config: AlignConfig, base: BaseModel, raw: RawDataset) -> PreparedDataset:
    """Build the training and validation rows; missing targets are generated on the cluster.

    Args:
        config: settings of the job.
        base: base model that answers prompts without a target.
        raw: prompts from `read_raw_dataset`.

    Raises:
        UsageError: if the hard filter removes all rows.
    """
    form_before = compute_predictability(raw.parts["train"])
    parts = _balance_forms(raw.parts, config.data) if config.data.balance_form else raw.parts
    with_system = {part: _add_system_messages(prompts, config) for part, prompts in parts.items() if part != "test"}
    condition = _judge_prompts(config, base, [p for listed in (*parts.values(), *with_system.values()) for p in listed])
    if condition is not None:
        with_system = {part: condition.select(prompts) for part, prompts in with_system.items()}
        if empty := [part for part, prompts in with_system.items() if not prompts]:
            raise UsageError(
                f"the condition leaves no prompts of the {empty[0]} part. Choose the other side or another threshold"
            )
    prompts = with_system["train"] + with_system["validation"]
    filled = fill_targets(config, base, prompts, needs_rejected_answers(config))
    count = len(with_system["train"])
    validation_prompts, test_prompts = ([p.prompt for p in parts[part]] for part in ("validation", "test"))
    rules, seed = config.data.filter_rules, config.data.seed
    train_context = FilterContext(seed, raw.held_out, [*validation_prompts, *test_prompts])
    filtered = apply_hard_filter(filled.rows[:count], rules, train_context)
    filtered_validation = apply_hard_filter(filled.rows[count:], rules, FilterContext(seed, raw.held_out, test_prompts))
    validation = interleave_classes(filtered_validation.rows)
    form_after = compute_predictability([row.prompt for row in filtered.rows])
    print_line(f"model {base.name}: {format_diagnosis(filled.diagnosis)}")
    print_line(
        f"hard filter: {count} -> {len(filtered.rows)} rows; form alone predicts the class with balanced accuracy "
        f"{form_before:.2f} -> {form_after:.2f}"
    )
    check_rows_left(filtered, "train")
    check_rows_left(filtered_validation, "validate")
    form = form_before, form_after
    return PreparedDataset(filtered.rows, validation, parts, filtered, form, raw.inputs, filled.diagnosis, condition)


def build_run_identity(settings: Mapping[str, Any], base: BaseModel, inputs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what must be equal for a run to be resumed: the settings, the base model and the contents of the sources.

    Args:
        settings: settings of the job that must be equal.
        base: base model; identified by its fingerprint.
        inputs: name, digest and number of rows of each source.

    Returns:
        The identity after a JSON round trip, so that it compares equal to one read from a file.
    """
    identity = {**settings, "fingerprint": base.fingerprint, "inputs": [dict(entry) for entry in inputs]}
    return json.loads(json.dumps(identity))


def interleave_classes(validation: Sequence[TrainingRow]) -> list[TrainingRow]:
    """Return the rows with harmful and benign ones alternating, so that every leading subset contains both.

    The order within each side is random but deterministic: it depends only on the prompts.
    """
    order = sorted(validation, key=lambda row: hash_to_fraction(f"{row.prompt.prompt}|{row.prompt.system}", 0))
    sides = [[row for row in order if (row.prompt.label == "harmful") == harmful] for harmful in (True, False)]
    return [row for pair in zip_longest(*sides) for row in pair if row is not None]


def prepare_many(configs: Mapping[str, AlignConfig], base: BaseModel) -> dict[str, PreparedDataset]:
    """Prepare a dataset for each config, by name; configs with the same data settings share one dataset.

    Raises:
        UsageError: if prompts cannot be read, or if the hard filter removes all rows.
    """
    datasets: dict[str, PreparedDataset] = {}
    shared: dict[str, PreparedDataset] = {}
    for name, config in configs.items():
        needs = [
            asdict(config.data),
            asdict(config.targets),
            asdict(config.condition),
            config.train.max_target_tokens,
            config.train.dtype,
        ]
        key = json.dumps([*needs, needs_rejected_answers(config)], sort_keys=True)
        shared[key] = datasets[name] = shared.get(key) or prepare_dataset(config, base, read_raw_dataset(config, base))
    return datasets


def needs_rejected_answers(config: AlignConfig) -> bool:
    """Return whether the objective also trains on rejected answers."""
    return "rejected" in objectives.get_objective(config.objective)(**config.objective_options).needs


def write_dataset(prepared: PreparedDataset, folder: Path) -> None:
    """Write filter.json, removed.jsonl and a JSONL file for each part to the run folder."""
    (folder / "filter.json").write_text(json.dumps(build_filter_table(prepared), indent=2) + "\n")
    (folder / "removed.jsonl").write_text("".join(json.dumps(line) + "\n" for line in list_removed_rows(prepared)))
    for part, prompts in prepared.parts.items():
        write_prompts(prompts, folder / f"{part}.jsonl")


def build_filter_table(prepared: PreparedDataset) -> dict[str, Any]:
    """Return the steps of the hard filter, the origins of the remaining targets, and the diagnosis of the model.

    `form_before` and `form_after` are the predictability of the class from the form.
    """
    steps = [asdict(step) for step in prepared.filtered.table]
    diagnosis = {name: _rate_as_json(rate) for name, rate in vars(prepared.diagnosis).items()}
    form = {"form_before": prepared.form[0], "form_after": prepared.form[1]}
    return {"table": steps, "origins": count_origins(prepared.filtered.rows), "diagnosis": diagnosis, **form}


def count_origins(rows: Sequence[TrainingRow]) -> dict[TargetOrigin, dict[Label, int]]:
    """Count rows by the origin of their target and by class; origins without rows are omitted."""
    counts: dict[TargetOrigin, Counter[Label]] = {
        origin: Counter(row.prompt.label for row in rows if row.origin == origin) for origin in TARGET_ORIGINS
    }
    return {origin: {label: count[label] for label in LABELS} for origin, count in counts.items() if count}


def format_diagnosis(diagnosis: Diagnosis) -> str:
    """Format the behavior of the frozen model as a line."""
    refused, answered = diagnosis.benign_refused, diagnosis.harmful_answered
    parts = [f"refuses {refused} of {refused.count} benign prompts"] if refused.count else []
    parts += [f"answers {answered} of {answered.count} harmful prompts"] if answered.count else []
    return ", ".join(parts) or "not diagnosed, as all prompts have targets"


def _rate_as_json(rate: Rate) -> dict[str, Any] | None:
    return asdict(rate) if rate.count else None


def list_removed_rows(prepared: PreparedDataset) -> list[dict[str, str]]:
    """Return the rows that the hard filter removed, each with the rule that removed it."""
    return [{"rule": rule, **_row_as_json(row)} for rule, row in prepared.filtered.removed]


def check_rows_left(filtered: FilterResult, what: str) -> None:
    """Raise UsageError if the hard filter removed all rows.

    Args:
        filtered: result of the filter.
        what: verb for the message, such as "train".

    Raises:
        UsageError: if no row is left; it names the rule that removed the last rows.
    """
    if not filtered.rows:
        last = next(step.rule for step in filtered.table if not any(step.left.values()))
        raise UsageError(
            f"the hard filter left no rows to {what} on, after {last}. Change data.filter_rules or add more and clearer prompts"
        )


def _judge_prompts(config: AlignConfig, base: BaseModel, prompts: Sequence[Prompt]) -> ConditionedPrompts | None:
    """Determine which prompts the prefix will steer; None if it has no condition."""
    settings = config.condition
    # Only `trimtab align` trains a guard. Arms of studies and trials of sweeps steer all prompts by default.
    if settings.detector in (None, AUTO):
        return None
    levels = settings.threshold, settings.false_positive_rate
    wanted = PrefixCondition(settings.detector, settings.side, *levels, settings.otherwise)
    condition = resolve_condition(wanted, base)
    engine = EngineConfig(num_slots=1, dtype=config.train.dtype, max_model_len=1024)
    judged = judge_prompts(condition, base, prompts, engine, config.scale.gpus_per_worker)
    print_line(f"condition: {condition.detector} {condition.side} {condition.threshold:.3f}")
    return judged


def _balance_forms(parts: Mapping[Part, list[Prompt]], data: DataConfig) -> dict[Part, list[Prompt]]:
    return {part: balance_forms(prompts, data.seed) for part, prompts in parts.items()}


def _read_and_split(config: AlignConfig) -> tuple[dict[Part, list[Prompt]], list[dict[str, Any]]]:
    data, limit = config.data, _count_side_prompts(config)
    prompts: list[Prompt] = []
    inputs: list[dict[str, Any]] = []
    sides: dict[Label, list[str] | str] = {"harmful": data.harmful, "benign_hard": data.benign}
    for label, sources in sides.items():
        side: list[Prompt] = []
        for source in as_source_list(sources):
            source_prompts = [
                p for p in read_all_prompts([source], label, data.columns) if (p.label == "harmful") == (label == "harmful")
            ]
            inputs.append({"name": source, "digest": compute_prompts_digest(source_prompts), "rows": len(source_prompts)})
            side += source_prompts
        if limit:
            # By group, so that most pairs of twins stay complete; with another hash than the split, which it would distort.
            side = sorted(side, key=lambda p: hash_to_fraction(f"limit|{p.group}", data.seed))[:limit]
        prompts += side
    return split_prompts(prompts, data.validation_fraction, data.test_fraction, data.seed), inputs


def _count_side_prompts(config: AlignConfig) -> int:
    """Return the maximum number of prompts of each side, 0 for all.

    By default, answers are generated only for as many prompts as training reads: half of the rows of all batches, and the
    held-out fractions. Short runs use at least `MIN_SIDE_PROMPTS`, so that the held-out parts have prompts of both sides.
    """
    if config.data.limit is not None:
        return config.data.limit
    trained = config.train.max_steps * config.train.global_batch_size / 2
    return max(MIN_SIDE_PROMPTS, ceil(trained / (1 - config.data.validation_fraction - config.data.test_fraction)))


def _row_as_json(row: TrainingRow) -> dict[str, str]:
    prompt = row.prompt
    return {"prompt": prompt.prompt, "class": prompt.label, "source": prompt.source, "target": row.target}


def _add_system_messages(prompts: Sequence[Prompt], config: AlignConfig) -> list[Prompt]:
    """Add a system message to a fraction of the prompts that have none."""
    result: list[Prompt] = []
    for prompt in prompts:
        fraction = hash_to_fraction(f"system|{prompt.prompt}", config.data.seed)
        if prompt.system is None and fraction < config.data.system_prompt_fraction:
            system = SYSTEMS[int(fraction / config.data.system_prompt_fraction * len(SYSTEMS))]
            result.append(replace(prompt, system=system))
        else:
            result.append(prompt)
    return result
