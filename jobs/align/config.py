"""Settings of the align job. Each field is at once an option of the command line, a key of the YAML and a line of the help."""

from dataclasses import asdict, dataclass, field
from math import inf
from typing import Any, Literal

from trimtab.errors import UsageError
from trimtab.jobs.runtime.config import ScaleConfig
from trimtab.types import FILTER_RULES, INITS, LABELS, MAX_ROWS, SYSTEM_PROMPTS, FilterRule, Position, Precision, SystemPrompt

DEMO_HARMFUL = ("trimtab:advbench", "trimtab:harmbench", "trimtab:pairs", "trimtab:contrast")
DEMO_BENIGN = ("trimtab:pairs", "trimtab:scary", "trimtab:contrast", "trimtab:plain", "trimtab:countries")
REFUSAL = "I'm sorry, but I can't help with that request."


# Who parts the prompts otherwise learns from what others are tested on.
PARTED_BY = ("validation", "test", "seed")


@dataclass(frozen=True)
class DataConfig:
    """Which prompts teach, and how they are prepared.

    Args:
        harmful: sources of prompts to refuse: files (.jsonl .json .csv .parquet), trimtab:NAME, or Hugging Face datasets.
        benign: sources of prompts to help with.
        columns: other names of the fields, as --data.columns.prompt NAME; fields: prompt, class, target, system,
            group, source, messages.
        validation: share of prompt groups kept to choose the checkpoint.
        test: share of prompt groups never trained on, for the report.
        balance_form: rewrite orders as questions and back until each class has half of each.
        own_system: share of training prompts that carry a system message of their own.
        refusal: the answer that harmful prompts without a target of their own are to get.
        rules: hard-filter rules that are on.
        keep_out: sources of evaluation prompts; a row that resembles one of them does not teach, nor does a near-duplicate of
            what the job itself validates or tests on (rule kept-out).
        limit: use at most so many prompts of each side, 0 for all.
        seed: seed of splits, form and filter; runs that differ in train.seed alone learn from the same rows.
    """

    harmful: list[str] | str = field(default_factory=lambda: list(DEMO_HARMFUL))
    benign: list[str] | str = field(default_factory=lambda: list(DEMO_BENIGN))
    columns: dict[str, str] = field(default_factory=dict[str, str])
    validation: float = 0.1
    test: float = 0.15
    balance_form: bool = True
    own_system: float = 0.2
    refusal: str = REFUSAL
    rules: list[FilterRule] = field(default_factory=lambda: list(FILTER_RULES))
    keep_out: list[str] | str = field(default_factory=list[str])
    limit: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (0 <= self.test < 0.9 and 0 < self.validation < 0.9 and self.test + self.validation < 1):
            raise UsageError(
                f"data.validation ({self.validation}) and data.test ({self.test}) must leave some data to train on"
            )


@dataclass(frozen=True)
class TargetsConfig:
    """Where the answers come from that prompts without a target of their own are to get. A benign one gets what the frozen
    model itself says: greedily, or the likeliest of several samples that the judge takes for help. A harmful one gets
    `data.refusal`, or the likeliest sample that the judge takes for a refusal.

    Args:
        samples: answers drawn for each prompt under each system prompt; 0 for one greedy answer without any.
        systems: system prompts to draw under: permissive for benign prompts, strict for harmful prompts, none for both.
        temperature: temperature of the samples.
    """

    samples: int = 0
    systems: list[SystemPrompt] = field(default_factory=lambda: list(SYSTEM_PROMPTS))
    temperature: float = 0.8

    def __post_init__(self) -> None:
        if not 0 <= self.samples <= 64:
            raise UsageError(f"targets.samples must be from 0 to 64, not {self.samples}")
        if self.temperature <= 0:
            raise UsageError(
                f"targets.temperature must be above 0, not {self.temperature}; greedy answers are targets.samples 0"
            )


@dataclass(frozen=True)
class TrainConfig:
    """How the prefix is optimised: AdamW without weight decay, cosine schedule with warm-up.

    Args:
        steps: optimiser steps at most.
        batch: rows in a global batch, whatever the number of workers.
        micro_batch: rows computed at once; also the unit that workers share.
        learning_rate: peak learning rate.
        warmup: share of the steps with a rising learning rate.
        clip: longest gradient (L2 norm).
        longest: tokens of each target that are learned from.
        mix: share of each class in every batch.
        weights: weight of each class in the loss (a_c), 1 where it is not named: more for harmful refuses more.
        init: first vectors: vocab-mean, random-row, or token:TEXT.
        precision: type of the frozen model; auto is bf16 where the machine computes in it, else fp32. The prefix is fp32.
        compile: compile the model's layers with torch.compile: a slower start, faster steps.
        recompute: keep no activations inside layers, and compute them again in the backward pass: less memory, a third
            slower.
        validate_every: steps between validations; 0 for none.
        validation_rows: rows to validate on at most, half of them harmful.
        patience: validations without a better loss before training stops early; 0 never stops early.
        checkpoint_every: steps between checkpoints.
        seed: seed of order and first vectors.
    """

    steps: int = 300
    batch: int = 16
    micro_batch: int = 4
    learning_rate: float = 0.03
    warmup: float = 0.05
    clip: float = 1.0
    longest: int = 32
    mix: dict[str, float] = field(default_factory=lambda: {"harmful": 0.5, "benign_hard": 0.35, "benign_easy": 0.15})
    weights: dict[str, float] = field(default_factory=dict[str, float])
    init: str = "vocab-mean"
    precision: Precision = "auto"
    compile: bool = False
    recompute: bool = False
    validate_every: int = 50
    validation_rows: int = 64
    patience: int = 4
    checkpoint_every: int = 25
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "micro_batch", "checkpoint_every", "longest"):
            if getattr(self, name) < 1:
                raise UsageError(f"train.{name} must be at least 1, not {getattr(self, name)}")
        if self.validation_rows < 2:
            raise UsageError(f"train.validation_rows must be at least 2, one of each side, not {self.validation_rows}")
        if not 0 < self.learning_rate < 100:
            raise UsageError(f"train.learning_rate must be above 0, not {self.learning_rate}")
        if not 0 <= self.warmup <= 1 or self.clip <= 0:
            raise UsageError("train.warmup must be a share of the steps, from 0 to 1, and train.clip above 0")
        for name in ("mix", "weights"):
            if unknown := getattr(self, name).keys() - set(LABELS):
                raise UsageError(f"train.{name} knows no class {min(unknown)!r}; there are {', '.join(LABELS)}")
        for label, weight in self.weights.items():
            if not 0 < weight < inf:
                raise UsageError(f"train.weights.{label} must be above 0, not {weight}; a class is left out by train.mix")
        if self.init not in INITS and not self.init.startswith("token:"):
            raise UsageError(f"train.init {self.init!r} must be {', '.join(INITS)} or token:TEXT")


@dataclass(frozen=True)
class EvaluateConfig:
    """How prefixes are judged.

    Args:
        limit: prompts of each side at most, 0 for all.
        max_tokens: tokens of each answer; a refusal shows in the first few.
    """

    limit: int = 120
    max_tokens: int = 24


@dataclass(frozen=True)
class GateConfig:
    """What a prefix must reach on the validation part to become champion.

    Args:
        gain: balanced score above the best of base, text prompt and present champion.
        compliance: share of benign prompts helped with.
    """

    gain: float = 0.0
    compliance: float = 0.8


@dataclass(frozen=True)
class AlignConfig:
    """Learn a prefix on a frozen model.

    Args:
        name: name of the prefix in the registry.
        base: base model: catalogue name, folder, or Hugging Face id.
        revision: revision of a Hugging Face id.
        place: where in the prompt the prefix goes.
        rows: learned embedding rows (k).
        objective: how it is learned: sta, likelihood, or one that another package registers.
        objective_options: settings of the objective, as --objective_options.gamma 1.
        resume: go on with the last unfinished run of this name; auto does so where there is one with these settings, and
            else begins one, for whatever starts a job again by itself.
        register: register the prefix, and promote it where it passes the gate.
    """

    name: str = "safety"
    base: str = "smollm2-135m"
    revision: str | None = None
    place: Position = "system"
    rows: int = 1
    objective: str = "sta"
    objective_options: dict[str, Any] = field(default_factory=dict[str, Any])
    data: DataConfig = field(default_factory=DataConfig)
    targets: TargetsConfig = field(default_factory=TargetsConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    scale: ScaleConfig = field(default_factory=ScaleConfig)
    resume: bool | Literal["auto"] = False
    register: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.rows <= MAX_ROWS:
            raise UsageError(f"rows must be from 1 to {MAX_ROWS}, not {self.rows}")
        batches = -(-self.train.batch // self.train.micro_batch)
        if not 1 <= self.scale.workers <= batches:
            raise UsageError(
                f"{self.scale.workers} workers cannot share {batches} micro-batches: make train.micro_batch smaller than "
                f"{self.train.micro_batch} or use fewer workers"
            )
        if not 0 <= self.scale.least_workers <= self.scale.workers:
            raise UsageError(f"scale.least_workers must be from 0 to scale.workers ({self.scale.workers})")

    def identity(self) -> dict[str, Any]:
        """What must be equal for a run to be resumed: everything but where and how widely it runs, and where its checkpoints
        are."""
        whole = asdict(self)
        kept = {key: value for key, value in whole.items() if key not in ("scale", "resume", "register", "gate", "evaluate")}
        return kept | {"storage": self.scale.storage}
