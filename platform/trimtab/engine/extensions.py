"""Request field `trimtab`, an extension of the OpenAI API."""

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from trimtab.detection import calibration
from trimtab.errors import UsageError

Policy = Literal["annotate", "refuse_above", "retry_above"]
# Keys of a card's thresholds by share of false alarms.
ALARMS = {float(key): key for key in calibration.ALARMS}
MOST_TRIES, MOST_TEXT = 8, 2000


@dataclass(frozen=True)
class RequestOptions:
    """Options of a request's `trimtab` object.

    Attributes:
        detector: NAME, NAME@ALIAS, NAME@VERSION, or `off`; if None, the server selects the detector.
        false_alarms: share of false alarms that selects the detector's threshold; an answer with a higher risk is flagged.
        running_risk: report risks in a stream before its end.
        policy: action for an answer whose risk is above `above`. `annotate` does nothing, `refuse_above` replaces the answer by
            `text`, and `retry_above` generates at most `tries` answers and returns the least risky one.
        above: risk limit of the policy, from 0 to 1; if None, the detector's threshold.
        tries: maximum number of answers for `retry_above`, the first one included.
        text: replacement of a withheld answer.
    """

    detector: str | None = None
    false_alarms: float = 0.05
    running_risk: bool = False
    policy: Policy = "annotate"
    above: float | None = None
    tries: int = 3
    text: str = "I am not sure enough of my answer to give it."

    @property
    def alarms(self) -> str:
        """Key of a card's thresholds."""
        return ALARMS[self.false_alarms]


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
    names = [f.name for f in fields(RequestOptions)]
    if unknown := [str(name) for name in value if name not in names]:
        raise UsageError(f"trimtab.{unknown[0][:50]} is not a known field; known fields: {', '.join(names)}")
    options: dict[str, Any] = asdict(RequestOptions()) | value
    _require(isinstance(options["detector"], str | None), "detector", "a name, NAME@ALIAS, NAME@VERSION, or off")
    _require(_is_number(options["false_alarms"]) and options["false_alarms"] in ALARMS, "false_alarms", "0.01, 0.05 or 0.1")
    _require(isinstance(options["running_risk"], bool), "running_risk", "true or false")
    _require(options["policy"] in get_args(Policy), "policy", ", ".join(get_args(Policy)))
    _require(
        options["above"] is None or (_is_number(options["above"]) and 0 <= options["above"] <= 1), "above", "a risk from 0 to 1"
    )
    _require(type(options["tries"]) is int and 1 <= options["tries"] <= MOST_TRIES, "tries", f"from 1 to {MOST_TRIES}")
    short = isinstance(options["text"], str) and len(options["text"]) <= MOST_TEXT
    _require(short, "text", f"text of at most {MOST_TEXT} characters")
    return RequestOptions(**options)


def _require(valid: bool, name: str, expected: str) -> None:
    if not valid:
        raise UsageError(f"trimtab.{name} must be {expected}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
