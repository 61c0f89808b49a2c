"""Settings of the evaluate commands."""

from dataclasses import dataclass, field

from trimtab.errors import UsageError
from trimtab.jobs.judge_config import JudgeConfig
from trimtab.types import Label, Precision


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
