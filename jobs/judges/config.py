"""Settings of judges: which one gives the verdicts, and the judges command."""

from dataclasses import dataclass, field
from typing import Literal

from trimtab.errors import UsageError
from trimtab.types import Precision

Kind = Literal["string", "classifier", "endpoint"]


@dataclass(frozen=True)
class JudgeConfig:
    """The judge that gives the verdicts.

    Args:
        kind: string matches words; classifier is a head on the base model; endpoint asks a language model.
        folder: the classifier's folder, as `trimtab judges --fit` writes it.
        url: the endpoint's URL, up to and with /v1. Its key comes from TRIMTAB_JUDGE_KEY, else OPENAI_API_KEY.
        model: the model to ask there.
        concurrency: requests at a time.
    """

    kind: Kind = "string"
    folder: str | None = None
    url: str | None = None
    model: str | None = None
    concurrency: int = 8

    def __post_init__(self) -> None:
        if self.kind == "classifier" and not self.folder:
            raise UsageError("a classifier needs --judge.folder; trimtab judges --fit FOLDER makes one")
        if self.kind == "endpoint" and not (self.url and self.model):
            raise UsageError("an endpoint needs --judge.url and --judge.model")
        if self.concurrency < 1:
            raise UsageError("--judge.concurrency must be at least 1")


@dataclass(frozen=True)
class JudgesConfig:
    """Measure judges against human labels, and fit the classifier.

    Args:
        fit: fit a classifier and save it to this folder.
        labels: more labelled answers to fit on: files with prompt, answer and refused.
        tokens: tokens of an answer's opening that the classifier reads.
        judge: a classifier or an endpoint to measure besides the string match.
        base: base model that the classifier reads with: catalogue name, folder, or Hugging Face id.
        revision: revision of a Hugging Face id.
        precision: type of the model; auto is bf16 where the machine computes in it, else fp32.
        gpus: GPUs for the model.
        address: Ray cluster to run on.
    """

    fit: str | None = None
    labels: list[str] | str = field(default_factory=list[str])
    tokens: int = 16
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    base: str = "smollm2-135m"
    revision: str | None = None
    precision: Precision = "auto"
    gpus: float = 0
    address: str | None = None

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise UsageError("--tokens must be at least 1")
        if self.labels and not self.fit:
            raise UsageError("--labels are to fit on: say where to save the classifier, with --fit FOLDER")
