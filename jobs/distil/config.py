"""Settings of `trimtab distil`."""

from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from trimtab.errors import UsageError
from trimtab.jobs.align.config import AlignConfig, ConditionConfig, TrainConfig
from trimtab.jobs.evaluate.config import UtilitySuite
from trimtab.jobs.judges.config import JudgeConfig
from trimtab.jobs.runtime.config import ScaleConfig, check_ranges
from trimtab.types import DEFAULT_BASE, DType, Position

AnswerPart = Literal["all", "first_half", "reasoning"]


@dataclass(frozen=True)
class DistilDataConfig:
    """User prompts of a distillation, and the answers of the teacher.

    Args:
        prompts: sources of user prompts; files (.jsonl .json .csv .parquet), trimtab:NAME, or Hugging Face datasets.
        columns: names of the source columns, as --data.columns.prompt NAME.
        limit: maximum number of prompts from the sources, 0 for all.
        num_questions: number of questions about the system prompt that the base model writes, 0 for none.
        num_requests: number of ordinary requests that the base model writes, 0 for none.
        decontaminate_against: sources of evaluation prompts; prompts that resemble one of them are removed.
        validation_fraction: fraction of the prompts held out to select the vectors.
        test_fraction: fraction of the prompts held out for the report.
        temperature: sampling temperature of the teacher's answers for training, 0 for greedy answers.
        answer_part: part of each answer to train on; all, first_half, or reasoning, which ends at its closing tag.
        seed: seed of the split and of all sampling.
    """

    prompts: list[str] | str = field(default_factory=lambda: ["trimtab:everyday", "trimtab:plain"])
    columns: dict[str, str] = field(default_factory=dict[str, str])
    limit: int = 240
    num_questions: int = 60
    num_requests: int = 0
    decontaminate_against: list[str] | str = field(default_factory=list[str])
    validation_fraction: float = 0.1
    test_fraction: float = 0.2
    temperature: float = 0.7
    answer_part: AnswerPart = "all"
    seed: int = 0

    def __post_init__(self) -> None:
        fractions = {"validation_fraction": (0.01, 0.8), "test_fraction": (0.01, 0.8), "temperature": (0, 5)}
        counts = dict.fromkeys(("limit", "num_questions", "num_requests"), (0, 100_000))
        check_ranges("data", self, fractions | counts)
        if self.validation_fraction + self.test_fraction >= 1:
            raise UsageError("data.validation_fraction and data.test_fraction must leave some prompts to train on. Lower one")


@dataclass(frozen=True)
class DistilEvaluateConfig:
    """Evaluation of the vectors against the system prompt.

    Args:
        limit: maximum number of test prompts.
        max_tokens: maximum length of an answer in tokens.
        utility: questions and neutral texts that measure the utility cost; null for none.
        judge: endpoint that decides rules of the kind judge.
    """

    limit: int = 60
    max_tokens: int = 96
    utility: UtilitySuite | None = field(
        default_factory=lambda: UtilitySuite(questions="trimtab:countries", texts="trimtab:neutral", limit=60)
    )
    judge: JudgeConfig = field(default_factory=JudgeConfig)

    def __post_init__(self) -> None:
        check_ranges("evaluate", self, {"limit": (1, 100_000), "max_tokens": (1, 4096)})


@dataclass(frozen=True)
class DistilGateConfig:
    """Gate that a distilled prefix must pass to become champion.

    Args:
        min_recovered: minimum share of the system prompt's gain on its rules that the vectors have; the whole 95 % interval for
            a later version, the point estimate for the first one. Only rules that the prompt improves by 20 points count.
        min_divergence_reduction: without rules that count, minimum share by which the vectors reduce the divergence of the base
            model from the teacher.
    """

    min_recovered: float = 0.8
    min_divergence_reduction: float = 0.5

    def __post_init__(self) -> None:
        check_ranges("gate", self, dict.fromkeys(("min_recovered", "min_divergence_reduction"), (0, 1)))


@dataclass(frozen=True)
class DistilConfig:
    """Compress a long system prompt into a prefix, evaluate it and register it.

    Args:
        system: text file with the system prompt.
        name: name of the prefix in the registry.
        base: base model; catalog name, folder, or Hugging Face id.
        revision: revision of a Hugging Face id.
        position: position of the prefix in the prompt.
        num_virtual_tokens: number of learned rows of the prefix (k).
        checks: YAML file with the rules of the system prompt, to measure how often answers obey them.
        resume: resume the last unfinished run of this name; auto resumes it if its settings are the same.
        register: register the prefix, and promote it if it passes the gate.
    """

    system: str = ""
    name: str = "distilled"
    base: str = DEFAULT_BASE
    revision: str | None = None
    position: Position = "system"
    num_virtual_tokens: int = 16
    checks: str | None = None
    data: DistilDataConfig = field(default_factory=DistilDataConfig)
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            max_steps=120,
            micro_batch_size=8,
            max_target_tokens=64,
            class_proportions={"benign_easy": 1.0},
            init="teacher",
            corrected_fraction=0,
            selection="loss",
            validate_every=40,
            early_stopping_patience=0,
        )
    )
    evaluate: DistilEvaluateConfig = field(default_factory=DistilEvaluateConfig)
    gate: DistilGateConfig = field(default_factory=DistilGateConfig)
    scale: ScaleConfig = field(default_factory=ScaleConfig)
    resume: bool | Literal["auto"] = False
    register: bool = True

    def __post_init__(self) -> None:
        if not self.system:
            raise UsageError("system is required. Pass --system FILE with the text of the system prompt")
        if self.train.selection != "loss":
            raise UsageError("train.selection must be loss: a distillation has no refusals to decide on")
        self.build_align_config()

    @property
    def dtype(self) -> DType:
        """Data type of the frozen model."""
        return self.train.dtype

    def build_align_config(self) -> AlignConfig:
        """Return the settings of the trainer.

        Raises:
            UsageError: if a setting is out of its range.
        """
        return AlignConfig(
            name=self.name,
            base=self.base,
            revision=self.revision,
            position=self.position,
            num_virtual_tokens=self.num_virtual_tokens,
            objective="distil",
            train=replace(self.train, class_proportions={"benign_easy": 1.0}, corrected_fraction=0.0),
            scale=self.scale,
            resume=self.resume,
            register=self.register,
            condition=ConditionConfig(None),
        )

    def identity(self) -> dict[str, Any]:
        """Return the settings that must be equal for a run to be resumed."""
        return self.build_align_config().identity() | {"data": asdict(self.data)}
