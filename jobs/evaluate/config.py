"""Settings of utility suites, in a study and by themselves."""

from dataclasses import dataclass, field

from trimtab.errors import UsageError
from trimtab.jobs.judges.config import JudgeConfig
from trimtab.types import AnswerKind, Label, Precision


@dataclass(frozen=True)
class UtilitySuite:
    """Questions and neutral texts that tell what an arm costs in ability.

    Args:
        questions: sources of questions with their answers: files, trimtab:NAME, or Hugging Face datasets.
        texts: sources of neutral texts: the same.
        kind: how answers are compared: exact, contains, f1 or numeric; without it as each question says, else contains.
        columns: other names of the fields, as columns.answers NAME: question, answers, context, kind, source, text, prompt.
        max_tokens: tokens of each answer; 0 for 32, or 320 where numbers are wanted, which come at the end.
        limit: questions, and texts, at most; 0 for all.
        longest: tokens of each text that are read.
    """

    questions: list[str] | str = ""
    texts: list[str] | str = ""
    kind: AnswerKind | None = None
    columns: dict[str, str] = field(default_factory=dict[str, str])
    max_tokens: int = 0
    limit: int = 0
    longest: int = 256

    def __post_init__(self) -> None:
        if not self.questions and not self.texts:
            raise UsageError("say what to measure on: questions or texts, as trimtab:countries and trimtab:neutral")
        if min(self.max_tokens, self.limit) < 0 or self.longest < 1:
            raise UsageError("max_tokens and limit must not be below 0, nor longest below 1")


@dataclass(frozen=True)
class UtilityConfig(UtilitySuite):
    """Measure what prefixes cost in ability.

    Args:
        prefix: prefixes to measure: champion (all of them), NAME, NAME@VERSION, or a folder; several as a list.
        base: base model: catalogue name, folder, or Hugging Face id.
        revision: revision of a Hugging Face id.
        precision: type of the model; auto is bf16 where the machine computes in it, else fp32.
        gpus: GPUs for the engine, and for reading.
        answers: write every answer with its mark, and every text's figures, to this JSON file.
        address: Ray cluster to run on.
    """

    prefix: list[str] | str = "champion"
    base: str = "smollm2-135m"
    revision: str | None = None
    precision: Precision = "auto"
    gpus: float = 0
    answers: str | None = None
    address: str | None = None


@dataclass(frozen=True)
class SafetyConfig:
    """Judge prefixes on prompt files.

    Args:
        data: sources of prompts, harmful and benign: files, trimtab:NAME, or Hugging Face datasets.
        default_class: class of prompts that bring none: harmful, benign_hard or benign_easy.
        columns: other names of the fields, as --columns.prompt NAME.
        prefix: prefixes to judge: champion (all of them), NAME, NAME@VERSION, or a folder; several as a list.
        base: base model: catalogue name, folder, or Hugging Face id.
        revision: revision of a Hugging Face id.
        limit: prompts of each side at most, 0 for all.
        max_tokens: tokens of each answer.
        precision: type of the model; auto is bf16 where the machine computes in it, else fp32.
        gpus: GPUs for the engine.
        judge: what gives the verdicts.
        plot: write the safety/helpfulness plane to this PNG file.
        answers: write every answer with its verdict to this JSON file.
        address: Ray cluster to run on.
    """

    data: list[str] | str = ""
    default_class: Label | None = None
    columns: dict[str, str] = field(default_factory=dict[str, str])
    prefix: list[str] | str = "champion"
    base: str = "smollm2-135m"
    revision: str | None = None
    limit: int = 0
    max_tokens: int = 48
    precision: Precision = "auto"
    gpus: float = 0
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    plot: str | None = None
    answers: str | None = None
    address: str | None = None

    def __post_init__(self) -> None:
        if not self.data:
            raise UsageError("say which prompts to judge on, with --data FILE")
