"""Settings of `trimtab align`.

Each field is a command-line option, a YAML key and an entry of `--help`.
"""

from dataclasses import asdict, dataclass, field
from math import inf
from typing import Any, Literal

from trimtab.errors import UsageError
from trimtab.evaluation.gate import GateRule
from trimtab.jobs.runtime.config import ScaleConfig, check_ranges
from trimtab.types import (
    DEFAULT_BASE,
    FILTER_RULES,
    INITS,
    LABELS,
    MAX_ROWS,
    TARGET_RUNGS,
    DType,
    FilterRule,
    Otherwise,
    Position,
    Selection,
    Side,
    TargetRung,
)

# Value of `condition.detector` with which the job trains a guard.
AUTO = "auto"
DEMO_HARMFUL = ("trimtab:advbench", "trimtab:harmbench", "trimtab:pairs", "trimtab:contrast")
DEMO_BENIGN = ("trimtab:pairs", "trimtab:scary", "trimtab:contrast", "trimtab:plain", "trimtab:countries")
REFUSAL = "I'm sorry, but I can't help with that request."


# Runs that are compared must agree on these fields: with another split, one run trains on the test prompts of the other.
PARTED_BY = ("validation_fraction", "test_fraction", "seed")


# Settings of training that count something.
AT_LEAST_ONE = ("max_steps", "global_batch_size", "micro_batch_size", "checkpoint_every", "max_target_tokens")


@dataclass(frozen=True)
class DataConfig:
    """Training prompts and their preparation.

    Args:
        harmful: sources of harmful prompts, to refuse; files (.jsonl .json .csv .parquet), trimtab:NAME, or Hugging Face
            datasets.
        benign: sources of benign prompts, to comply with; same formats.
        columns: names of the source columns, as --data.columns.prompt NAME; fields are prompt, class, target, system,
            group, source, messages.
        validation_fraction: fraction of prompt groups held out to select the checkpoint.
        test_fraction: fraction of prompt groups held out for the report.
        balance_form: rewrite instructions as questions and questions as instructions until each class has half of each.
        system_prompt_fraction: fraction of training prompts that get a system message.
        refusal: target answer of harmful prompts without a target.
        filter_rules: enabled hard-filter rules.
        decontaminate_against: sources of evaluation prompts; rule contamination removes training rows that resemble one of
            them, and near-duplicates of this job's validation and test prompts.
        limit: maximum number of prompts of each side (harmful, benign), 0 for all; by default as many as training reads, and at
            least 120.
        seed: seed of the split, the form balancing and the filter; runs that differ only in train.seed train on the same
            rows.
    """

    harmful: list[str] | str = field(default_factory=lambda: list(DEMO_HARMFUL))
    benign: list[str] | str = field(default_factory=lambda: list(DEMO_BENIGN))
    columns: dict[str, str] = field(default_factory=dict[str, str])
    validation_fraction: float = 0.1
    test_fraction: float = 0.15
    balance_form: bool = True
    system_prompt_fraction: float = 0.2
    refusal: str = REFUSAL
    filter_rules: list[FilterRule] = field(default_factory=lambda: list(FILTER_RULES))
    decontaminate_against: list[str] | str = field(default_factory=list[str])
    limit: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_ranges("data", self, {"system_prompt_fraction": (0, 1)})
        if self.limit is not None:
            check_ranges("data", self, {"limit": (0, inf)})
        if not (
            0 <= self.test_fraction < 0.9
            and 0 < self.validation_fraction < 0.9
            and self.test_fraction + self.validation_fraction < 1
        ):
            raise UsageError(
                f"data.validation_fraction ({self.validation_fraction}) and data.test_fraction ({self.test_fraction}) must "
                "leave some data to train on"
            )


@dataclass(frozen=True)
class TargetsConfig:
    """Target answers for prompts without a target: answers of the frozen model, which a judge must classify as wanted.

    A benign prompt needs compliance, a harmful one a refusal. Rungs are tried in turn, each for the prompts that are still
    open: the greedy answer; samples; samples under a system prompt that asks for the wanted kind; an opening that the model
    continues. A benign prompt without a target is removed by the hard filter; a harmful one gets `data.refusal`.

    Args:
        benign_rungs: rungs for benign prompts; greedy is always tried.
        harmful_rungs: rungs for harmful prompts; greedy is always tried, and no rungs mean `data.refusal` for all.
        num_samples: answers per rung with samples.
        temperature: sampling temperature.
        max_opening_fraction: maximum fraction of benign targets that begin with an opening.
    """

    benign_rungs: list[TargetRung] = field(default_factory=lambda: list(TARGET_RUNGS))
    harmful_rungs: list[TargetRung] = field(default_factory=lambda: list(TARGET_RUNGS[:1]))
    num_samples: int = 2
    temperature: float = 0.8
    max_opening_fraction: float = 0.5

    def __post_init__(self) -> None:
        check_ranges("targets", self, {"num_samples": (1, 64), "max_opening_fraction": (0, 1)})
        if self.temperature <= 0:
            raise UsageError(
                f"targets.temperature must be above 0, not {self.temperature}. For greedy answers, set --targets.benign_rungs "
                "greedy"
            )


@dataclass(frozen=True)
class TrainConfig:
    """Optimization of the prefix: AdamW without weight decay, cosine schedule with warm-up.

    Args:
        max_steps: maximum number of optimizer steps.
        global_batch_size: training rows in the global batch, for any number of workers.
        micro_batch_size: training rows in one forward pass; workers share a batch by micro-batches.
        learning_rate: peak learning rate.
        warmup_ratio: fraction of the steps with a linearly rising learning rate.
        max_grad_norm: maximum L2 norm of the gradient; larger gradients are scaled down to it.
        max_target_tokens: maximum number of target tokens in the loss, per row.
        class_proportions: fraction of each class in every batch.
        class_weights: weight of each class in the loss (a_c), 1 for a class that is not listed; a larger weight of harmful
            makes the prefix refuse more.
        init: initial vectors; vocab-mean, random-row, token:TEXT, or teacher for tokens of the system prompt of a distillation.
        dtype: data type of the frozen model; auto is bf16 if the hardware supports it, else fp32. The prefix is fp32.
        compile: compile the model's layers with torch.compile; slower start, faster steps.
        activation_checkpointing: recompute the activations inside layers in the backward pass (activation checkpointing); less
            memory, a third slower.
        validate_every: steps between validations; 0 disables validation.
        validation_rows: maximum number of validation rows, half of them harmful.
        early_stopping_patience: validations without a better value before training stops early; 0 disables early stopping.
        checkpoint_every: steps between checkpoints.
        seed: seed of the row order and of the initial vectors.
        corrected_fraction: fraction of each class in every batch whose targets correct the model; the other rows, which it
            answers as wanted by itself, prevent drift.
        selection: measure on the validation rows that selects the vectors and stops training early; decision is the
            probability of the openers of refusals after harmful prompts, and of help after benign ones, loss is the mean loss.
    """

    max_steps: int = 120
    global_batch_size: int = 8
    micro_batch_size: int = 4
    learning_rate: float = 0.03
    warmup_ratio: float = 0.05
    max_grad_norm: float = 1.0
    max_target_tokens: int = 12
    class_proportions: dict[str, float] = field(
        default_factory=lambda: {"harmful": 0.5, "benign_hard": 0.35, "benign_easy": 0.15}
    )
    class_weights: dict[str, float] = field(default_factory=dict[str, float])
    init: str = "vocab-mean"
    dtype: DType = "auto"
    compile: bool = False
    activation_checkpointing: bool = False
    validate_every: int = 20
    validation_rows: int = 64
    early_stopping_patience: int = 4
    checkpoint_every: int = 20
    seed: int = 0
    corrected_fraction: float = 0.5
    selection: Selection = "decision"

    def __post_init__(self) -> None:
        check_ranges("train", self, dict.fromkeys(AT_LEAST_ONE, (1, inf)))
        ranges = {
            "validate_every": (0, inf),
            "early_stopping_patience": (0, inf),
            "warmup_ratio": (0, 1),
            "corrected_fraction": (0, 1),
        }
        check_ranges("train", self, ranges)
        if self.validation_rows < 2:
            raise UsageError(f"train.validation_rows must be at least 2, one of each side, not {self.validation_rows}")
        if not 0 < self.learning_rate < 100:
            raise UsageError(f"train.learning_rate must be above 0 and below 100, not {self.learning_rate}")
        if not 0 < self.max_grad_norm < inf:
            raise UsageError(f"train.max_grad_norm must be above 0, not {self.max_grad_norm}")
        check_ranges("train.class_proportions", self.class_proportions, dict.fromkeys(self.class_proportions, (0, inf)))
        for name in ("class_proportions", "class_weights"):
            if unknown := getattr(self, name).keys() - set(LABELS):
                raise UsageError(f"train.{name}: unknown class {min(unknown)!r}. Known classes: {', '.join(LABELS)}")
        for label, weight in self.class_weights.items():
            if not 0 < weight < inf:
                raise UsageError(
                    f"train.class_weights.{label} must be above 0, not {weight}. To omit a class, use train.class_proportions"
                )
        if self.init not in INITS and not self.init.startswith("token:"):
            raise UsageError(f"train.init {self.init!r} must be {', '.join(INITS)} or token:TEXT")


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluation of the prefix and the baseline arms.

    Args:
        limit: maximum number of prompts of each side (harmful, benign), 0 for all.
        max_tokens: maximum length of an answer in tokens; a refusal shows in the first few.
    """

    limit: int = 120
    max_tokens: int = 24

    def __post_init__(self) -> None:
        check_ranges("evaluate", self, {"limit": (0, inf), "max_tokens": (1, inf)})


@dataclass(frozen=True)
class GateConfig:
    """Gate on the validation part that a prefix must pass to become champion.

    Args:
        min_improvement: margin by which the balanced score must exceed the best of base, text prompt and current champion.
        min_compliance: minimum fraction of benign prompts that are answered; for a model that answers fewer, its own fraction.
        rule: interval requires the whole 95 % interval of the improvement to be above min_improvement, point the point estimate
            only; the first champion of a name needs the point estimate only.
    """

    min_improvement: float = 0.0
    min_compliance: float = 0.8
    rule: GateRule = "interval"

    def __post_init__(self) -> None:
        check_ranges("gate", self, {"min_improvement": (-1, 1), "min_compliance": (0, 1)})


@dataclass(frozen=True)
class ConditionConfig:
    """Condition under which the prefix steers a request, by the verdict of a detector of prompts.

    The prefix is trained on the prompts that it will steer.

    Args:
        detector: detector of prompts: NAME, NAME@ALIAS or NAME@VERSION; null lets the prefix steer all requests. With auto,
            the job trains a detector on its own prompts if there are 100 of each side; the prefix then steers the prompts that
            it does not flag, and the others are refused.
        side: side of the threshold: above steers prompts that the detector flags, below the others.
        threshold: risk above which a prompt is flagged, from 0 to 1; by default a threshold of the detector.
        false_positive_rate: false positive rate that selects the detector's threshold; by default the balanced threshold.
        otherwise: answer to the other prompts: base is that of the base model, refuse a fixed refusal, for side below only.
    """

    detector: str | None = AUTO
    side: Side = "above"
    threshold: float | None = None
    false_positive_rate: float | None = None
    otherwise: Otherwise = "base"

    def __post_init__(self) -> None:
        if self.threshold is not None and self.false_positive_rate is not None:
            raise UsageError("condition.threshold and condition.false_positive_rate exclude each other. Set one of them")
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise UsageError(f"condition.threshold must be a risk from 0 to 1, not {self.threshold}")
        if self.otherwise == "refuse" and self.side == "above":
            raise UsageError(
                "condition.otherwise refuse would refuse the prompts that are not flagged. Set condition.side below"
            )


@dataclass(frozen=True)
class AlignConfig:
    """Train a prefix on a frozen base model, evaluate it and register it.

    Args:
        name: name of the prefix in the registry.
        base: base model; catalog name, folder, or Hugging Face id.
        revision: revision of a Hugging Face id.
        position: position of the prefix in the prompt.
        num_virtual_tokens: number of learned rows of the prefix (k).
        objective: registered training objective, such as sta or likelihood; other packages can register more.
        objective_options: settings of the objective, as --objective_options.gamma 1.
        resume: resume the last unfinished run of this name; auto resumes it if its settings are the same and else starts a
            new run, for schedulers that restart a job.
        register: register the prefix, and promote it if it passes the gate.
    """

    name: str = "safety"
    base: str = DEFAULT_BASE
    revision: str | None = None
    position: Position = "system"
    num_virtual_tokens: int = 1
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
    condition: ConditionConfig = field(default_factory=ConditionConfig)

    def __post_init__(self) -> None:
        if not 1 <= self.num_virtual_tokens <= MAX_ROWS:
            raise UsageError(f"num_virtual_tokens must be from 1 to {MAX_ROWS}, not {self.num_virtual_tokens}")
        batches = -(-self.train.global_batch_size // self.train.micro_batch_size)
        if not 1 <= self.scale.num_workers <= batches:
            raise UsageError(
                f"{self.scale.num_workers} workers cannot share {batches} micro-batches. Set train.micro_batch_size below "
                f"{self.train.micro_batch_size} or use fewer workers"
            )
        if not 0 <= self.scale.min_workers <= self.scale.num_workers:
            raise UsageError(f"scale.min_workers must be from 0 to scale.num_workers ({self.scale.num_workers})")

    def identity(self) -> dict[str, Any]:
        """Return the settings that must be equal for a run to be resumed.

        These are all settings except `resume`, `register`, `gate`, `evaluate` and `scale`; of `scale` only the checkpoint
        storage is included.
        """
        excluded = ("scale", "resume", "register", "gate", "evaluate")
        included = {key: value for key, value in asdict(self).items() if key not in excluded}
        return included | {"storage_path": self.scale.storage_path}


@dataclass(frozen=True)
class FilterConfig(AlignConfig):
    """Show the rows that the hard filter keeps, without training."""
