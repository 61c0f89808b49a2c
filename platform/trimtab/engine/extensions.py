"""Request field `trimtab`, an extension of the OpenAI API."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from pydantic import TypeAdapter, ValidationError

from trimtab.detection import calibration
from trimtab.engine.policies import MAX_ATTEMPTS, MAX_TEXT, parse_policies
from trimtab.engine.policies import Policy as DetectorPolicy
from trimtab.errors import UsageError

Policy = Literal["annotate", "refuse", "retry", "stop"]
# Keys of a card's thresholds by false positive rate.
THRESHOLD_KEYS = {float(key): key for key in calibration.FALSE_POSITIVE_RATES}
COERCED_FIELDS: dict[str, TypeAdapter[Any]] = {
    "n": TypeAdapter(int),
    "stream": TypeAdapter(bool),
    "use_beam_search": TypeAdapter(bool),
    "background": TypeAdapter(bool),
    "enable_response_messages": TypeAdapter(bool),
}


@dataclass(frozen=True)
class RequestOptions:
    """Options of a request's `trimtab` object.

    Attributes:
        detector: NAME, NAME@ALIAS, NAME@VERSION, or `off`; if None, the server selects the detector.
        false_positive_rate: false positive rate that selects the detector's threshold; an answer with a higher risk is flagged.
        running_risk: report risks in a stream before its end.
        policy: action for an answer whose risk is above `risk_threshold`. `annotate` does nothing, `refuse` replaces the answer
            by `refusal_text`, `retry` generates at most `max_attempts` answers and returns the least risky one, and `stop` ends
            the answer while it is generated.
        risk_threshold: risk limit of the policy, from 0 to 1; if None, the detector's threshold.
        max_attempts: maximum number of answers for `retry`, the first one included.
        refusal_text: replacement of a withheld answer.
        policies: policies on the prompt and the answer, in addition to those of the server and of the API key.
    """

    detector: str | None = None
    false_positive_rate: float = 0.05
    running_risk: bool = False
    policy: Policy = "annotate"
    risk_threshold: float | None = None
    max_attempts: int = 3
    refusal_text: str = "I am not sure enough of my answer to give it."
    policies: tuple[DetectorPolicy, ...] = ()

    @property
    def fpr_key(self) -> str:
        """Key of a card's thresholds."""
        return THRESHOLD_KEYS[self.false_positive_rate]


DEFAULTS = RequestOptions()


def coerce_request(request: Mapping[str, Any]) -> dict[str, Any]:
    """Return a request whose counts and flags have the types that vLLM reads them as.

    vLLM takes `"n": "2"` and `"stream": "true"`. Limits and streams must see the same values. Values that vLLM rejects stay
    as they are.

    Args:
        request: request body.
    """
    coerced = dict(request)
    for name, adapter in COERCED_FIELDS.items():
        if coerced.get(name) is not None:
            with suppress(ValidationError):
                coerced[name] = adapter.validate_python(coerced[name])
    return coerced


def parse_options(value: Any) -> RequestOptions:
    """Validate a request's `trimtab` field.

    Args:
        value: parsed JSON value of the field; None if the request has no such field.

    Returns:
        The options, with defaults for absent fields.

    Raises:
        UsageError: if the field is not an object, or one of its fields is unknown or invalid. The message names that field.
    """
    if value is None:
        return RequestOptions()
    if not isinstance(value, dict):
        raise UsageError("trimtab must be an object")
    names = [f.name for f in fields(DEFAULTS)]
    if unknown := [str(name) for name in value if name not in names]:
        raise UsageError(f"trimtab.{unknown[0][:50]} is not a known field; known fields: {', '.join(names)}")
    options: dict[str, Any] = {f.name: getattr(DEFAULTS, f.name) for f in fields(DEFAULTS)} | value
    _require(isinstance(options["detector"], str | None), "detector", "a name, NAME@ALIAS, NAME@VERSION, or off")
    rate, threshold, attempts = (options[name] for name in ("false_positive_rate", "risk_threshold", "max_attempts"))
    _require(_is_number(rate) and rate in THRESHOLD_KEYS, "false_positive_rate", "0.01, 0.05 or 0.1")
    _require(isinstance(options["running_risk"], bool), "running_risk", "true or false")
    _require(options["policy"] in get_args(Policy), "policy", ", ".join(get_args(Policy)))
    in_range = threshold is None or (_is_number(threshold) and 0 <= threshold <= 1)
    _require(in_range, "risk_threshold", "a risk from 0 to 1")
    _require(type(attempts) is int and 1 <= attempts <= MAX_ATTEMPTS, "max_attempts", f"from 1 to {MAX_ATTEMPTS}")
    short = isinstance(options["refusal_text"], str) and len(options["refusal_text"]) <= MAX_TEXT
    _require(short, "refusal_text", f"text of at most {MAX_TEXT} characters")
    options["policies"] = parse_policies(options["policies"], "trimtab.policies")
    return RequestOptions(**options)


def _require(valid: bool, name: str, expected: str) -> None:
    if not valid:
        raise UsageError(f"trimtab.{name} must be {expected}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
