"""Settings of the collect command."""

from dataclasses import dataclass, field

from trimtab.errors import UsageError
from trimtab.jobs.judges.config import JudgeConfig
from trimtab.jobs.runtime.config import ScaleConfig
from trimtab.types import AnswerKind, Precision

MOST_SAMPLES = 100


@dataclass(frozen=True)
class CollectConfig:
    """Answer questions with the frozen model, or read given answers, and keep its signals: what detectors learn from.

    Args:
        questions: sources of questions with their answers: files, trimtab:NAME, or Hugging Face datasets.
        out: folder of the data set; the same command goes on where it stopped.
        given: read answers that the files hold instead of asking: each row has `given`, and `truthful` where that is known, or
            has answers that are `right` and others that are `wrong`.
        separator: what stands between several given answers in one text.
        columns: other names of the fields, as --columns.answers NAME: question, answers, context, kind, source, group; and
            given, truthful, right, wrong.
        kind: how answers are compared: exact, contains, f1 or numeric; without it as each question says, else contains.
        judge: string compares as `kind` says; endpoint asks a language model whether an answer is right.
        base: base model: catalogue name, folder, or Hugging Face id.
        revision: revision of a Hugging Face id.
        prefix: prefix to answer under: NAME, NAME@VERSION, or a folder; none without.
        layers: layers whose states are kept, 0 being the embeddings; without any, one at two thirds of the depth and the last.
        max_tokens: tokens of each answer at most.
        max_length: tokens of a prompt and its answer together at most; questions that are longer are left out, and counted.
        limit: questions at most; 0 for all.
        samples: more answers drawn for each question, which some scores and the head sep learn from: 10 are enough; each
            costs as many tokens as an answer.
        temperature: temperature of the samples.
        p_true: ask the model of each answer whether it is true, for the score p-true; costs one token.
        precision: type of the model; auto is bf16 where the machine computes in it, else fp32.
        scale: engines, and what they take of the cluster.
    """

    questions: list[str] | str = ""
    out: str = ""
    given: bool = False
    separator: str | None = None
    columns: dict[str, str] = field(default_factory=dict[str, str])
    kind: AnswerKind | None = None
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    base: str = "smollm2-135m"
    revision: str | None = None
    prefix: str | None = None
    layers: list[int] = field(default_factory=list[int])
    max_tokens: int = 48
    max_length: int = 2048
    limit: int = 0
    samples: int = 0
    temperature: float = 1.0
    p_true: bool = False
    precision: Precision = "auto"
    scale: ScaleConfig = field(default_factory=ScaleConfig)

    def __post_init__(self) -> None:
        if not self.questions or not self.out:
            raise UsageError("say what to ask and where to keep it, with --questions FILE (or trimtab:countries) --out FOLDER")
        if self.max_tokens < 1 or self.limit < 0:
            raise UsageError("max_tokens must be at least 1, and limit not below 0")
        if self.max_length <= self.max_tokens:
            raise UsageError(f"max_length must be above max_tokens ({self.max_tokens}), not {self.max_length}")
        if not 0 <= self.samples <= MOST_SAMPLES:
            raise UsageError(f"samples must be from 0 to {MOST_SAMPLES}, not {self.samples}")
        if not 0 < self.temperature <= 2:
            raise UsageError(f"temperature must be above 0 and at most 2, not {self.temperature}; samples must differ")
        if self.judge.kind == "classifier":
            raise UsageError("--judge.kind classifier knows refusals, not right answers; use string or endpoint")
        if self.given and self.judge.kind != "string":
            raise UsageError("with --given true the files say what is right; leave --judge.kind out")
