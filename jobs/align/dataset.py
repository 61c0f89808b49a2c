"""From prompt sources to rows that may teach: read, split, balance form, fetch targets, filter."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from trimtab import objectives
from trimtab.cli.console import print_line
from trimtab.data.hard_filter import FilterContext, FilterResult, TrainingRow, apply_hard_filter
from trimtab.data.prompt import Prompt, compute_prompts_digest, hash_to_fraction, split_prompts, write_prompts
from trimtab.data.question_form import balance_forms, compute_predictability
from trimtab.data.readers import read_all_prompts
from trimtab.errors import UsageError
from trimtab.jobs.align.config import AlignConfig, DataConfig
from trimtab.jobs.align.targets import fill_targets
from trimtab.jobs.runtime.config import as_source_list
from trimtab.model.base_model import BaseModel
from trimtab.model.chat_template import build_renderer
from trimtab.types import Label, Part

# Neutral system messages in our own words: a prefix must work beside the request's own.
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
    """Prompts by part, those that no row may resemble, and the inputs with their digests."""

    parts: dict[Part, list[Prompt]]
    kept_out: list[str]
    inputs: list[dict[str, Any]]


@dataclass(frozen=True)
class PreparedDataset:
    """Rows to train and validate on, prompts to validate and test answers on, and how they came about."""

    train: list[TrainingRow]
    validation: list[TrainingRow]
    parts: dict[Part, list[Prompt]]
    filtered: FilterResult
    form: tuple[float, float]
    inputs: list[dict[str, Any]]


def read_raw_dataset(config: AlignConfig, base: BaseModel) -> RawDataset:
    """All that is read before anything is asked of a cluster.

    Raises UsageError for prompts that cannot be read or are too few, and for a place that the chat template does not have.
    """
    build_renderer(base, config.rows).insert_row_tokens([{"role": "user", "content": "x"}], config.place, ())
    data = config.data
    parts, inputs = _read_and_split(data)
    kept_out = [p.prompt for p in read_all_prompts(as_source_list(data.keep_out), "benign_hard", data.columns)]
    return RawDataset(parts, kept_out, inputs)


def prepare_dataset(config: AlignConfig, base: BaseModel, given: RawDataset) -> PreparedDataset:
    """Everything that training needs; samples missing targets on the cluster.

    Raises UsageError where the hard filter leaves nothing.
    """
    form_before = compute_predictability(given.parts["train"])
    parts = _balance_forms(given.parts, config.data) if config.data.balance_form else given.parts
    with_system = {part: _add_system_messages(prompts, config) for part, prompts in parts.items() if part != "test"}
    filled = fill_targets(config, base, with_system["train"] + with_system["validation"], needs_rejected_answers(config))
    count = len(with_system["train"])
    validate_on, test_on = ([p.prompt for p in parts[part]] for part in ("validation", "test"))
    rules, seed = config.data.rules, config.data.seed
    filtered = apply_hard_filter(filled[:count], rules, FilterContext(seed, given.kept_out, [*validate_on, *test_on]))
    checked = apply_hard_filter(filled[count:], rules, FilterContext(seed, given.kept_out, test_on))
    validation = interleave_classes(checked.rows)
    form_after = compute_predictability([row.prompt for row in filtered.rows])
    print_line(
        f"hard filter: {count} -> {len(filtered.rows)} rows; form alone tells the class with balanced accuracy "
        f"{form_before:.2f} -> {form_after:.2f}"
    )
    check_rows_left(filtered, "train")
    check_rows_left(checked, "validate")
    return PreparedDataset(filtered.rows, validation, parts, filtered, (form_before, form_after), given.inputs)


def build_run_identity(config: AlignConfig, base: BaseModel, inputs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """All that a run must share with the one that it goes on with: settings, the model's weights, and what its sources held;
    as it is read back from JSON."""
    whole = config.identity() | {"fingerprint": base.fingerprint, "inputs": [dict(entry) for entry in inputs]}
    return json.loads(json.dumps(whole))


def interleave_classes(validation: Sequence[TrainingRow]) -> list[TrainingRow]:
    """Harmful and benign rows in turns, each side in an order of chance that stays: any first part of them judges both."""
    order = sorted(validation, key=lambda row: hash_to_fraction(f"{row.prompt.prompt}|{row.prompt.system}", 0))
    sides = [[row for row in order if (row.prompt.label == "harmful") == harmful] for harmful in (True, False)]
    return [row for pair in zip_longest(*sides) for row in pair if row is not None]


def prepare_many(configs: Mapping[str, AlignConfig], base: BaseModel) -> dict[str, PreparedDataset]:
    """What `prepare` makes of each; those with the same data and needs share it."""
    done: dict[str, PreparedDataset] = {}
    shared: dict[str, PreparedDataset] = {}
    for name, config in configs.items():
        needs = [asdict(config.data), asdict(config.targets), config.train.longest, config.train.precision]
        key = json.dumps([*needs, needs_rejected_answers(config)], sort_keys=True)
        shared[key] = done[name] = shared.get(key) or prepare_dataset(config, base, read_raw_dataset(config, base))
    return done


def needs_rejected_answers(config: AlignConfig) -> bool:
    """Whether the objective learns from answers that are not wanted, too."""
    return "rejected" in objectives.get_objective(config.objective)(**config.objective_options).needs


def write_dataset(prepared: PreparedDataset, folder: Path) -> None:
    """Keep the filter's table, what it removed, and the parts beside the run."""
    (folder / "filter.json").write_text(json.dumps(build_filter_table(prepared), indent=2) + "\n")
    (folder / "removed.jsonl").write_text("".join(json.dumps(line) + "\n" for line in list_removed_rows(prepared)))
    for part, prompts in prepared.parts.items():
        write_prompts(prompts, folder / f"{part}.jsonl")


def build_filter_table(prepared: PreparedDataset) -> dict[str, Any]:
    """The filter's table, and how well form alone tells the class before and after."""
    steps = [asdict(step) for step in prepared.filtered.table]
    return {"table": steps, "form_before": prepared.form[0], "form_after": prepared.form[1]}


def list_removed_rows(prepared: PreparedDataset) -> list[dict[str, str]]:
    """Every row that a rule took out."""
    return [{"rule": rule, **_row_as_json(row)} for rule, row in prepared.filtered.removed]


def check_rows_left(filtered: FilterResult, what: str) -> None:
    """Raise UsageError with the rule that took the last rows, where it left none to `what` on."""
    if not filtered.rows:
        last = next(step.rule for step in filtered.table if not any(step.left.values()))
        raise UsageError(
            f"the hard filter left no rows to {what} on, after {last}: look at data.rules, or give more and clearer rows"
        )


def _balance_forms(parts: Mapping[Part, list[Prompt]], data: DataConfig) -> dict[Part, list[Prompt]]:
    return {part: balance_forms(prompts, data.seed) for part, prompts in parts.items()}


def _read_and_split(data: DataConfig) -> tuple[dict[Part, list[Prompt]], list[dict[str, Any]]]:
    everything: list[Prompt] = []
    inputs: list[dict[str, Any]] = []
    sides: dict[Label, list[str] | str] = {"harmful": data.harmful, "benign_hard": data.benign}
    for label, given in sides.items():
        side: list[Prompt] = []
        for source in as_source_list(given):
            prompts = [
                p for p in read_all_prompts([source], label, data.columns) if (p.label == "harmful") == (label == "harmful")
            ]
            inputs.append({"name": source, "digest": compute_prompts_digest(prompts), "rows": len(prompts)})
            side += prompts
        if data.limit:
            side = sorted(side, key=lambda p: hash_to_fraction(p.prompt, data.seed))[: data.limit]
        everything += side
    return split_prompts(everything, data.validation, data.test, data.seed), inputs


def _row_as_json(row: TrainingRow) -> dict[str, str]:
    prompt = row.prompt
    return {"prompt": prompt.prompt, "class": prompt.label, "source": prompt.source, "target": row.target}


def _add_system_messages(prompts: Sequence[Prompt], config: AlignConfig) -> list[Prompt]:
    """Give a share of the prompts a system message of their own."""
    given: list[Prompt] = []
    for prompt in prompts:
        at = hash_to_fraction(f"system|{prompt.prompt}", config.data.seed)
        if prompt.system is None and at < config.data.own_system:
            system = SYSTEMS[int(at / config.data.own_system * len(SYSTEMS))]
            given.append(replace(prompt, system=system))
        else:
            given.append(prompt)
    return given
