"""Configuration of judges and of the judges command."""

from dataclasses import dataclass, field
from typing import Literal

from trimtab.errors import UsageError
from trimtab.types import DEFAULT_BASE, DType

Kind = Literal["string", "classifier", "endpoint"]


@dataclass(frozen=True)
class JudgeConfig:
    """Judge of the answers.

    Args:
        kind: string matches words; classifier is a head on the base model; endpoint asks a language model.
        folder: folder of the classifier, as written by `trimtab judges --fit`.
        url: URL of the endpoint, up to and including /v1. The API key is read from TRIMTAB_JUDGE_KEY, else OPENAI_API_KEY.
        model: model of the endpoint.
        max_concurrency: maximum number of concurrent requests.
    """

    kind: Kind = "string"
    folder: str | None = None
    url: str | None = None
    model: str | None = None
    max_concurrency: int = 8

    def __post_init__(self) -> None:
        if self.kind == "classifier" and not self.folder:
            raise UsageError("a classifier needs --judge.folder. Run trimtab judges --fit FOLDER to create one")
        if self.kind == "endpoint" and not (self.url and self.model):
            raise UsageError("an endpoint needs --judge.url and --judge.model")
        if self.max_concurrency < 1:
            raise UsageError("--judge.max_concurrency must be at least 1")


@dataclass(frozen=True)
class JudgesConfig:
    """Measure judges against human labels, and fit a classifier.

    Args:
        fit: fit a classifier and save it to this folder.
        labels: additional labeled answers to fit on: files with prompt, answer and refused.
        max_answer_tokens: number of leading tokens of an answer that the classifier reads.
        judge: classifier or endpoint to measure in addition to the string match.
        base: base model of the classifier: catalog name, folder, or Hugging Face id.
        revision: revision of a Hugging Face id.
        dtype: data type of the model; auto is bf16 if the machine supports it, else fp32.
        num_gpus: number of GPUs for the model.
        address: address of the Ray cluster.
    """

    fit: str | None = None
    labels: list[str] | str = field(default_factory=list[str])
    max_answer_tokens: int = 16
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    base: str = DEFAULT_BASE
    revision: str | None = None
    dtype: DType = "auto"
    num_gpus: float = 0
    address: str | None = None

    def __post_init__(self) -> None:
        if self.max_answer_tokens < 1:
            raise UsageError("--max_answer_tokens must be at least 1")
        if self.labels and not self.fit:
            raise UsageError("--labels requires --fit. Pass --fit FOLDER, the folder to save the classifier to")
