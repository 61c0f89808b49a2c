"""Policies: actions for prompts and answers that a detector flags.

Free of heavy imports: the settings of the server check them.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from trimtab.errors import UsageError
from trimtab.types import FIXED_REFUSAL, Subject

Action = Literal["annotate", "route", "retry", "stop", "refuse"]
# From the mildest to the strictest action.
ACTIONS: tuple[Action, ...] = ("annotate", "route", "retry", "stop", "refuse")
# Actions by subject of the detector.
SUBJECT_ACTIONS: Mapping[Subject, tuple[Action, ...]] = {
    "prompt": ("annotate", "route", "refuse"),
    "answer": ("annotate", "retry", "stop", "refuse"),
}
# Decimals of a probability in a response.
DIGITS = 4
MAX_POLICIES, MAX_TEXT, MAX_NAME, MAX_ATTEMPTS = 8, 2000, 300, 8


@dataclass(frozen=True)
class Policy:
    """Policy for the prompts or answers that a detector flags.

    Policies of the server, of the API key and of the request are added. Each is applied, and of those that are triggered, the
    strictest action wins: `refuse` before `stop` before `retry`, and `refuse` before `route`, before `annotate`.

    Attributes:
        detector: NAME, NAME@ALIAS or NAME@VERSION of a detector.
        action: `annotate` reports the verdict. On prompts, `route` lets another model answer, and `refuse` answers with
            `refusal_text`. On answers, `stop` ends an answer while it is generated, `retry` generates at most `max_attempts`
            answers and returns the least risky one, and `refuse` replaces a complete answer by `refusal_text`.
        threshold: risk above which a prompt or answer is flagged, from 0 to 1; if None, a threshold of the detector.
        false_positive_rate: false positive rate that selects the detector's threshold; if None, the balanced threshold for
            prompts, and 0.05 for answers.
        refusal_text: answer of `refuse`.
        model: model that answers instead for `route`: BASE, BASE:NAME or BASE:NAME@REFERENCE.
        unchecked: what happens to a request that the detector cannot check: `fail` rejects it, `pass` answers it.
        max_attempts: maximum number of answers for `retry`, the first one included.
        label: label of a detector with several; if None, the highest risk of all labels counts.
    """

    __pydantic_config__ = ConfigDict(strict=True, allow_inf_nan=False, extra="forbid")

    detector: str
    action: Action = "annotate"
    threshold: float | None = None
    false_positive_rate: float | None = None
    refusal_text: str = FIXED_REFUSAL
    model: str | None = None
    unchecked: Literal["fail", "pass"] = "fail"
    max_attempts: int = 3
    label: str | None = None

    @property
    def acts(self) -> bool:
        """Whether the policy does more than to report the verdict."""
        return self.action != "annotate"


ADAPTER = TypeAdapter(Policy)


def parse_policies(values: Any, name: str) -> tuple[Policy, ...]:
    """Validate a list of policies.

    Args:
        values: JSON value of the list.
        name: name of the field in errors.

    Raises:
        UsageError: if the value is not a list of at most MAX_POLICIES policies, or a policy has an unknown or invalid field.
    """
    if not isinstance(values, list | tuple) or len(values) > MAX_POLICIES:
        raise UsageError(f"{name} must be a list of at most {MAX_POLICIES} policies")
    return tuple(_parse_policy(value, f"{name}[{number}]") for number, value in enumerate(values))


def select_strictest(actions: Sequence[Action]) -> int:
    """Return the index of the strictest of at least one action; of equal ones, the first."""
    return max(range(len(actions)), key=lambda index: (ACTIONS.index(actions[index]), -index))


def _parse_policy(value: Any, name: str) -> Policy:
    try:
        # As JSON: in Python objects, pydantic's strict mode accepts no dictionary in the place of a dataclass.
        policy = ADAPTER.validate_json(json.dumps(value, default=str))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join([name, *(str(part)[:50] for part in first["loc"])])
        raise UsageError(f"{place} is invalid: {first['msg'].lower()}") from error
    if policy.threshold is not None and not 0 <= policy.threshold <= 1:
        raise UsageError(f"{name}.threshold must be a risk from 0 to 1")
    if policy.threshold is not None and policy.false_positive_rate is not None:
        raise UsageError(f"{name} has both threshold and false_positive_rate. Set one of them")
    if not policy.detector or len(policy.detector) > MAX_NAME or policy.detector == "off":
        raise UsageError(f"{name}.detector must be NAME, NAME@ALIAS or NAME@VERSION")
    if len(policy.refusal_text) > MAX_TEXT:
        raise UsageError(f"{name}.refusal_text must be text of at most {MAX_TEXT} characters")
    if not 1 <= policy.max_attempts <= MAX_ATTEMPTS:
        raise UsageError(f"{name}.max_attempts must be from 1 to {MAX_ATTEMPTS}")
    if (policy.action == "route") != (policy.model is not None):
        raise UsageError(f"{name}.model is the target of action route, and needed for it")
    return policy
