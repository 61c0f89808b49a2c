"""What a request may ask of trimtab: the field `trimtab` beside those of the OpenAI API."""

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from trimtab.detection import calibration
from trimtab.errors import UsageError

Policy = Literal["annotate", "refuse_above", "retry_above"]
# The keys of a card's thresholds.
ALARMS = {float(key): key for key in calibration.ALARMS}
MOST_TRIES, MOST_TEXT = 8, 2000


@dataclass(frozen=True)
class RequestOptions:
    """Read from a request's `trimtab` object.

    `detector` names one, with an alias or version where wanted, or is `off`; without it, the server chooses. An answer is
    flagged above the threshold that has the share `false_alarms` of them. `running_risk` gives risks in a stream before its
    end. The `policy` is what happens above the risk `above` (without it, the threshold): nothing, `text` in the answer's
    place, or up to `tries` answers in all, of which the least risky is given.
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
        """The key of a card's thresholds."""
        return ALARMS[self.false_alarms]


def parse_options(given: Any) -> RequestOptions:
    """Check a request's `trimtab` field. Raises UsageError that names what is wrong."""
    if given is None:
        return RequestOptions()
    if not isinstance(given, dict):
        raise UsageError("trimtab must be an object")
    names = [f.name for f in fields(RequestOptions)]
    if unknown := [str(name) for name in given if name not in names]:
        raise UsageError(f"trimtab.{unknown[0][:50]} is not known; there are {', '.join(names)}")
    asked: dict[str, Any] = asdict(RequestOptions()) | given
    _require(isinstance(asked["detector"], str | None), "detector", "a name, NAME@ALIAS, NAME@VERSION, or off")
    _require(_is_number(asked["false_alarms"]) and asked["false_alarms"] in ALARMS, "false_alarms", "0.01, 0.05 or 0.1")
    _require(isinstance(asked["running_risk"], bool), "running_risk", "true or false")
    _require(asked["policy"] in get_args(Policy), "policy", ", ".join(get_args(Policy)))
    _require(asked["above"] is None or (_is_number(asked["above"]) and 0 <= asked["above"] <= 1), "above", "a risk from 0 to 1")
    _require(type(asked["tries"]) is int and 1 <= asked["tries"] <= MOST_TRIES, "tries", f"from 1 to {MOST_TRIES}")
    short = isinstance(asked["text"], str) and len(asked["text"]) <= MOST_TEXT
    _require(short, "text", f"text of at most {MOST_TEXT} characters")
    return RequestOptions(**asked)


def _require(right: bool, name: str, wanted: str) -> None:
    if not right:
        raise UsageError(f"trimtab.{name} must be {wanted}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
