"""Check of a prompt: a detector with a threshold, as the engine's worker applies it."""

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

from trimtab.engine.policies import MAX_POLICIES

# Extra arguments of a request: the encoded checks of its prompt, and whether the worker captures no signals of its answer.
PROMPT_CHECKS, UNTRACKED = "trimtab_prompt_checks", "trimtab_untracked"
# Policies of a server, a key and a request, and the condition of a prefix.
MAX_CHECKS = 3 * MAX_POLICIES + 1


@dataclass(frozen=True)
class PromptCheck:
    """Check of the prompt of one request.

    Attributes:
        digest: digest of the detector.
        threshold: risk that triggers the check.
        above: whether a risk above the threshold triggers it; otherwise one that is not above.
        stops: whether a triggered check ends the request after its prefill.
        required: whether a check without a risk ends the request as well.
    """

    digest: str
    threshold: float
    above: bool = True
    stops: bool = False
    required: bool = False


def encode_checks(checks: Sequence[PromptCheck]) -> dict[str, Any]:
    """Return the extra arguments of a request with these checks."""
    return {PROMPT_CHECKS: [list(astuple(check)) for check in checks]}


def decode_checks(extra_args: dict[str, Any] | None) -> tuple[PromptCheck, ...]:
    """Return the checks in the extra arguments of a request."""
    return tuple(PromptCheck(*values) for values in (extra_args or {}).get(PROMPT_CHECKS, ()))
