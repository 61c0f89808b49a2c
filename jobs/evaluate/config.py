"""Configuration of `trimtab evaluate safety`, `trimtab evaluate utility`, and the utility suites of a study."""

from dataclasses import dataclass, field
from typing import Literal

from trimtab.errors import UsageError
from trimtab.jobs.judges.config import JudgeConfig
from trimtab.types import DEFAULT_BASE, AnswerKind, Attack, DType, Label


@dataclass(frozen=True)
class UtilitySuite:
    """Questions and neutral texts that measure the utility of an arm.

    Args:
        questions: sources of questions with reference answers: files, trimtab:NAME, or Hugging Face datasets.
        texts: sources of neutral texts: files, trimtab:NAME, or Hugging Face datasets.
        kind: comparison of answers: exact, contains, f1 or numeric; if omitted, the kind of each question, else contains.
        columns: other names of the fields, as columns.answers NAME: question, answers, context, kind, source, text, prompt.
        max_tokens: maximum length of each answer, in tokens; 0 for 32, or 320 if numbers are compared, which come last in an
            answer.
        limit: maximum number of questions, and of texts; 0 for all.
        max_text_tokens: maximum number of tokens of each text to read.
    """

    questions: list[str] | str = ""
    texts: list[str] | str = ""
    kind: AnswerKind | None = None
    columns: dict[str, str] = field(default_factory=dict[str, str])
    max_tokens: int = 0
    limit: int = 0
    max_text_tokens: int = 256

    def __post_init__(self) -> None:
        if not self.questions and not self.texts:
            raise UsageError("questions or texts are required. Pass for example trimtab:countries and trimtab:neutral")
        if min(self.max_tokens, self.limit) < 0 or self.max_text_tokens < 1:
            raise UsageError("max_tokens and limit must not be below 0, and max_text_tokens must be at least 1")


@dataclass(frozen=True)
class UtilityConfig(UtilitySuite):
    """Measure accuracy, perplexity and KL drift of the base model, a text prompt and prefixes.

    Args:
        prefix: prefixes to measure: champion (all champions), NAME, NAME@VERSION, or a folder; several as a list.
        base: base model: catalog name, folder, or Hugging Face id.
        revision: revision of a Hugging Face id.
        dtype: data type of the model; auto is bf16 if the machine supports it, else fp32.
        num_gpus: number of GPUs for the engine, and for reading texts.
        answers_file: JSON file to write every answer with its mark, and the metrics of every text, to.
        address: address of the Ray cluster.
    """

    prefix: list[str] | str = "champion"
    base: str = DEFAULT_BASE
    revision: str | None = None
    dtype: DType = "auto"
    num_gpus: float = 0
    answers_file: str | None = None
    address: str | None = None


@dataclass(frozen=True)
class GuardConfig:
    """Measure how often rewrites of prompts change the verdict of a detector of prompts.

    Args:
        data: sources of prompts, harmful and benign: files, trimtab:NAME, or Hugging Face datasets.
        detector: detector of prompts: NAME, NAME@ALIAS, NAME@VERSION or a folder.
        attacks: names of the rewrites, or all.
        threshold: risk above which the detector flags a prompt; by default its balanced threshold.
        default_class: class of prompts without a class: harmful, benign_hard or benign_easy.
        columns: other names of the fields, as --columns.prompt NAME.
        base: base model: catalog name, folder, or Hugging Face id.
        revision: revision of a Hugging Face id.
        limit: maximum number of harmful prompts, and of benign prompts; 0 for all.
        max_tokens: maximum length of the base model's answers to harmful prompts, in tokens.
        dtype: data type of the model; auto is bf16 if the machine supports it, else fp32.
        num_gpus: number of GPUs for the engine.
        address: address of the Ray cluster.
    """

    data: list[str] | str = ""
    detector: str = ""
    attacks: list[Attack] | Literal["all"] = "all"
    threshold: float | None = None
    default_class: Label | None = None
    columns: dict[str, str] = field(default_factory=dict[str, str])
    base: str = DEFAULT_BASE
    revision: str | None = None
    limit: int = 100
    max_tokens: int = 24
    dtype: DType = "auto"
    num_gpus: float = 0
    address: str | None = None

    def __post_init__(self) -> None:
        if not self.data or not self.detector:
            raise UsageError("data and detector are required. Pass --data FILE --detector NAME")
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise UsageError(f"threshold must be a risk from 0 to 1, not {self.threshold}")
        if self.limit < 0 or self.max_tokens < 1:
            raise UsageError("limit must not be below 0, and max_tokens must be at least 1")


@dataclass(frozen=True)
class SafetyConfig:
    """Measure refusal and compliance of the base model, a text prompt and prefixes on any prompt files.

    Args:
        data: sources of prompts, harmful and benign: files, trimtab:NAME, or Hugging Face datasets.
        default_class: class of prompts without a class: harmful, benign_hard or benign_easy.
        columns: other names of the fields, as --columns.prompt NAME.
        prefix: prefixes to measure: champion (all champions), NAME, NAME@VERSION, or a folder; several as a list.
        base: base model: catalog name, folder, or Hugging Face id.
        revision: revision of a Hugging Face id.
        limit: maximum number of harmful prompts, and of benign prompts; 0 for all.
        max_tokens: maximum length of each answer, in tokens.
        dtype: data type of the model; auto is bf16 if the machine supports it, else fp32.
        num_gpus: number of GPUs for the engine.
        judge: judge of the answers.
        detector: detector of prompts: NAME, NAME@ALIAS, NAME@VERSION or a folder. It adds the arms `guard`, which refuses
            flagged prompts, `conditional`, in which the prefix steers flagged prompts only, and `conditional help`, in which
            flagged prompts are refused and the prefix steers the others; conditions of the prefixes themselves do not apply.
        threshold: risk above which the detector flags a prompt; by default its balanced threshold.
        plot_file: PNG file to draw the safety/helpfulness plane to.
        answers_file: JSON file to write every answer with its verdict to.
        address: address of the Ray cluster.
    """

    data: list[str] | str = ""
    default_class: Label | None = None
    columns: dict[str, str] = field(default_factory=dict[str, str])
    prefix: list[str] | str = "champion"
    base: str = DEFAULT_BASE
    revision: str | None = None
    limit: int = 0
    max_tokens: int = 48
    dtype: DType = "auto"
    num_gpus: float = 0
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    detector: str | None = None
    threshold: float | None = None
    plot_file: str | None = None
    answers_file: str | None = None
    address: str | None = None

    def __post_init__(self) -> None:
        if not self.data:
            raise UsageError("data is required. Pass --data FILE")
        if self.threshold is not None and (self.detector is None or not 0 <= self.threshold <= 1):
            raise UsageError("threshold must be a risk from 0 to 1, and needs --detector")
