"""Risks of the answers to one HTTP request."""

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from trimtab.detector import Detector
from trimtab.engine.library import Loaded


@dataclass
class Watch:
    """Who watches the answers to a request: a detector, or nobody for a `reason`.

    `alarms` is the share of false alarms that its threshold is chosen by; `running` gives risks of answers that are not done;
    `warning` says why risks may be off; `shadow` that nobody gets the answer; `given` is the number of tokens of an answer that
    someone else wrote. `risks` are by the choices' indices, as far as they are known, of which so many have `ended`; `tokens`
    were written so far.
    """

    detector: Loaded[Detector] | None = None
    status: str = "off"
    reason: str | None = None
    alarms: str = "0.05"
    running: bool = False
    warning: str | None = None
    shadow: bool = False
    given: int = 0
    risks: dict[int, float] = field(default_factory=dict[int, float])
    ids: dict[str, str] = field(default_factory=dict[str, str])
    choices: int = 0
    ended: int = 0
    tokens: int = 0

    def fresh(self, *, shadow: bool = False) -> "Watch":
        """The same watcher, for another answer."""
        return Watch(self.detector, self.status, self.reason, self.alarms, self.running, self.warning, shadow)

    @property
    def label(self) -> str | None:
        """The detector's name and version."""
        return f"{self.detector.known.name}@{self.detector.known.version}" if self.detector else None

    @property
    def threshold(self) -> float | None:
        """The risk above which an answer is flagged."""
        return self.detector.part.card.thresholds[self.alarms] if self.detector else None

    def choice(self, index: int) -> dict[str, Any]:
        """What a choice says of its risk; nothing where that is not known."""
        risk, threshold = self.risks.get(index), self.threshold
        return {} if risk is None or threshold is None else {"risk": round(risk, 4), "flagged": risk > threshold}

    def as_json(self) -> dict[str, Any]:
        """The response's `trimtab.detector`: of its first choice, where there are several."""
        if self.detector is None:
            return {"status": self.status} | ({"reason": self.reason} if self.reason else {})
        known = self.detector.known
        named = {"name": known.name, "version": known.version, "run_id": known.run_id}
        said = named | {"false_alarms": float(self.alarms), "threshold": self.threshold}
        said |= {"warning": self.warning} if self.warning else {}
        if (first := self.choice(0)) == {}:
            pending = {"status": "unavailable", "reason": "other choices are not done"}
            missing = {"status": "unavailable", "reason": "the engine has no signals of this answer"}
            return (pending if self.ended < self.choices else missing) | said
        return {"status": "scored"} | first | said


watching: ContextVar[Watch | None] = ContextVar("watching", default=None)
"""Who watches the HTTP request that this task answers."""
