"""Words that settings, cards and code share; importing them costs nothing."""

from typing import Literal, get_args

Precision = Literal["auto", "bf16", "fp32"]
Position = Literal["system", "system-end", "user", "start"]
POSITIONS: tuple[Position, ...] = get_args(Position)
# Embedding rows of a prefix (k).
MAX_ROWS = 64
Label = Literal["harmful", "benign_hard", "benign_easy"]
LABELS: tuple[Label, ...] = get_args(Label)
# First vectors that need no text.
INITS = ("vocab-mean", "random-row")
# How an answer is compared with those that are wanted.
AnswerKind = Literal["exact", "contains", "f1", "numeric"]
ANSWER_KINDS: tuple[AnswerKind, ...] = get_args(AnswerKind)
Part = Literal["train", "validation", "test"]
FilterRule = Literal["agreed", "clear", "leak", "length", "duplicate", "kept-out", "balanced"]
FILTER_RULES: tuple[FilterRule, ...] = get_args(FilterRule)
# System prompts that answers are drawn under.
SystemPrompt = Literal["none", "permissive", "strict"]
SYSTEM_PROMPTS: tuple[SystemPrompt, ...] = get_args(SystemPrompt)
# Arms that nothing is learned for.
BASE_ARM, TEXT_ARM, RANDOM_ARM, TOKEN_ARM = "base", "text prompt", "random vector", "best token"
BASELINE_ARMS = (BASE_ARM, TEXT_ARM, RANDOM_ARM, TOKEN_ARM)
# What a refusal judge says of an answer.
Verdict = Literal["refusal", "partial", "compliance"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
