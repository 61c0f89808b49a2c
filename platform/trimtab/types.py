"""Literal types and constants shared by settings, cards and code; free of heavy imports."""

from typing import Literal, get_args

# Base model that commands use by default.
DEFAULT_BASE = "smollm2-135m"
DType = Literal["auto", "bf16", "fp32"]
Position = Literal["system", "system-end", "user", "start", "user-end"]
FIXED_REFUSAL = "I cannot help with that request."
"""Answer of policies and conditions that refuse, unless another text is set."""
Otherwise = Literal["base", "refuse"]
"""Answer to prompts that a conditional prefix does not steer: that of the base model, or a refusal."""
POSITIONS: tuple[Position, ...] = get_args(Position)
# Maximum number of rows of a prefix (k).
MAX_ROWS = 64
Label = Literal["harmful", "benign_hard", "benign_easy"]
LABELS: tuple[Label, ...] = get_args(Label)
# Initializations of a prefix that need no text.
INITS = ("vocab-mean", "random-row", "teacher")
# Comparison of an answer with the reference answers.
AnswerKind = Literal["exact", "contains", "f1", "numeric"]
ANSWER_KINDS: tuple[AnswerKind, ...] = get_args(AnswerKind)
# Side of a threshold on which a prefix steers requests.
Side = Literal["above", "below"]
# Rewrites of prompts that can hide them from a detector.
Attack = Literal[
    "harmless_words",
    "role_play",
    "spelling",
    "upper_case",
    "mixed_case",
    "spacing",
    "homoglyphs",
    "two_turns",
    "system_message",
    "tool_message",
]
ATTACKS: tuple[Attack, ...] = get_args(Attack)
Part = Literal["train", "validation", "test"]
# Subject of a detector: the risk that an answer is made up, or that a prompt is harmful.
Subject = Literal["answer", "prompt"]
SUBJECTS: tuple[Subject, ...] = get_args(Subject)
FilterRule = Literal["agreed", "clear", "leak", "length", "duplicate", "contamination", "balanced"]
FILTER_RULES: tuple[FilterRule, ...] = get_args(FilterRule)
# Ways to obtain the target of a training row from the frozen model, in the order in which they are tried.
TargetRung = Literal["greedy", "samples", "system_prompt", "opening"]
TARGET_RUNGS: tuple[TargetRung, ...] = get_args(TargetRung)
# Origin of a target: the data, a rung, or the fixed refusal of the settings.
TargetOrigin = Literal["given", "greedy", "samples", "system_prompt", "opening", "fixed"]
TARGET_ORIGINS: tuple[TargetOrigin, ...] = get_args(TargetOrigin)
# Measure on the validation rows that selects the vectors of a prefix.
Selection = Literal["decision", "loss"]
# Arms without training.
BASE_ARM, TEXT_ARM, EMPTY_ARM = "base", "text prompt", "empty system prompt"
RANDOM_ARM, TOKEN_ARM = "random vector", "best token"
# Arms that act on the verdict of a detector of prompts.
GUARD_ARM, CONDITIONAL_ARM = "guard", "conditional"
BASELINE_ARMS = (BASE_ARM, TEXT_ARM, EMPTY_ARM, RANDOM_ARM, TOKEN_ARM)
# Verdict of a refusal judge on an answer.
Verdict = Literal["refusal", "partial", "compliance"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
