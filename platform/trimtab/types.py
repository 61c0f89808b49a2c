"""Words that settings, cards and code share; importing them costs nothing."""

from typing import Literal, get_args

Precision = Literal["auto", "bf16", "fp32"]
Place = Literal["system", "system-end", "user", "start"]
PLACES: tuple[Place, ...] = get_args(Place)
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
Rule = Literal["agreed", "clear", "leak", "length", "duplicate", "kept-out", "balanced"]
RULES: tuple[Rule, ...] = get_args(Rule)
# System prompts that answers are drawn under.
Leaning = Literal["none", "permissive", "strict"]
LEANINGS: tuple[Leaning, ...] = get_args(Leaning)
# Arms that nothing is learned for.
BASE_ARM, TEXT_ARM, RANDOM_ARM, TOKEN_ARM = "base", "text prompt", "random vector", "best token"
UNLEARNED = (BASE_ARM, TEXT_ARM, RANDOM_ARM, TOKEN_ARM)
# What a refusal judge says of an answer.
Verdict = Literal["refusal", "partial", "compliance"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
