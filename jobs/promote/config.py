"""Settings of `trimtab promote`."""

from dataclasses import dataclass, field

from trimtab.evaluation.promotion_rules import PromotionRule
from trimtab.jobs.judges.config import JudgeConfig
from trimtab.types import Precision


@dataclass(frozen=True)
class PromoteConfig:
    """Make a version the champion, where it passes the gate.

    Args:
        name: name of the prefix or detector.
        version: its number, or an alias.
        base: its base model.
        rules: what must hold of it, in the YAML of --config; without rules, the gate that it met when it was made decides.
        force: promote it whatever the gate says; that stays on record.
        reason: why, for the record.
        columns: other names of the fields of prompts, as --columns.class label.
        max_tokens: tokens of each answer of a prefix.
        precision: type of the model; auto is bf16 where the machine computes in it, else fp32.
        gpus: GPUs for the engine.
        judge: what gives the verdicts on a prefix's answers.
        address: Ray cluster to run on.
    """

    name: str
    version: str = "candidate"
    base: str = "smollm2-135m"
    rules: list[PromotionRule] = field(default_factory=list[PromotionRule])
    force: bool = False
    reason: str | None = None
    columns: dict[str, str] = field(default_factory=dict[str, str])
    max_tokens: int = 48
    precision: Precision = "auto"
    gpus: float = 0
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    address: str | None = None
