"""Configuration of `trimtab promote`."""

from dataclasses import dataclass, field

from trimtab.evaluation.promotion_rules import PromotionRule
from trimtab.jobs.judges.config import JudgeConfig
from trimtab.types import DEFAULT_BASE, DType


@dataclass(frozen=True)
class PromoteConfig:
    """Make a version the champion if it passes the gate.

    Args:
        name: name of the prefix or detector.
        version: version number, or an alias.
        base: base model of the version.
        rules: rules that the version must pass, as YAML in --config; without rules, the gate's earlier decision applies.
        force: promote the version even if it fails the gate; the override is recorded.
        reason: reason to record with the promotion.
        columns: other names of the fields of prompts, as --columns.class label.
        max_tokens: maximum length of each answer of a prefix, in tokens.
        dtype: data type of the model; auto is bf16 if the machine supports it, else fp32.
        num_gpus: number of GPUs for the engine.
        judge: judge of the answers of a prefix.
        address: address of the Ray cluster.
    """

    name: str
    version: str = "candidate"
    base: str = DEFAULT_BASE
    rules: list[PromotionRule] = field(default_factory=list[PromotionRule])
    force: bool = False
    reason: str | None = None
    columns: dict[str, str] = field(default_factory=dict[str, str])
    max_tokens: int = 48
    dtype: DType = "auto"
    num_gpus: float = 0
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    address: str | None = None
