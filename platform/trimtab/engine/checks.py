"""Checks that the engine's worker applies to a request: of its prompt once, and of its answer while it is generated."""

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

from trimtab.engine.policies import MAX_POLICIES

# Extra arguments of a request: the encoded checks of its prompt and of its answer, whether the worker captures no signals of
# its answer, and whether it stores the signals of the unfinished answer, and of the prompt.
PROMPT_CHECKS, ANSWER_CHECKS = "trimtab_prompt_checks", "trimtab_answer_checks"
UNTRACKED, RECORDED, PROMPT_STORED = "trimtab_untracked", "trimtab_recorded", "trimtab_prompt_stored"
EXTRA_ARGS = frozenset({PROMPT_CHECKS, ANSWER_CHECKS, UNTRACKED, RECORDED, PROMPT_STORED})
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


@dataclass(frozen=True)
class AnswerCheck:
    """Check of an answer at every `CHECK_INTERVAL` tokens; a risk above the threshold ends the request.

    Attributes:
        digest: digest of the detector.
        threshold: risk above which the check ends the request.
        required: whether a check without a risk ends the request as well.
    """

    digest: str
    threshold: float
    required: bool = False


@dataclass(frozen=True)
class RequestChecks:
    """Checks of one request.

    Attributes:
        prompt: checks of the prompt.
        answer: checks of the answer.
    """

    prompt: Sequence[PromptCheck] = ()
    answer: Sequence[AnswerCheck] = ()

    @property
    def can_stop(self) -> bool:
        """Whether a check can end the request."""
        return bool(self.answer) or any(check.stops for check in self.prompt)

    @property
    def is_required(self) -> bool:
        """Whether the request must end if it cannot be checked."""
        return any(check.required for check in self.answer) or any(check.stops and check.required for check in self.prompt)


def encode_checks(checks: RequestChecks) -> dict[str, Any]:
    """Return the extra arguments of a request with these checks."""
    encoded = {PROMPT_CHECKS: checks.prompt, ANSWER_CHECKS: checks.answer}
    return {name: [list(astuple(check)) for check in listed] for name, listed in encoded.items() if listed}


def decode_checks(extra_args: dict[str, Any] | None) -> RequestChecks:
    """Return the checks in the extra arguments of a request."""
    arguments = extra_args or {}
    return RequestChecks(
        tuple(PromptCheck(*values) for values in arguments.get(PROMPT_CHECKS, ())),
        tuple(AnswerCheck(*values) for values in arguments.get(ANSWER_CHECKS, ())),
    )
