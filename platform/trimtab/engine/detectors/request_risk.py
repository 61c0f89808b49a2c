"""Risks of the answers to one HTTP request."""

from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from trimtab.artifacts.prefix import Prefix
from trimtab.detection.detector import Detector, check_base
from trimtab.engine.extensions import Wishes
from trimtab.engine.prefixes.catalog import Aliases, Library, Loaded, Source
from trimtab.errors import ArtefactError
from trimtab.model.base_model import BaseModel


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

OFF = "off"
UNSEEN = "this server captures no signals: it had no detector when it started, or was started with --detect false"


@dataclass(frozen=True)
class Choice:
    """A detector, or none for a `reason`."""

    detector: Loaded[Detector] | None
    reason: str = ""


class Watchers:
    """The detectors of a server whose engine captures `layers` of `base`. `default` names the one that watches where a request
    names none; without it, the champion that was fitted under the request's prefix, else the only champion."""

    def __init__(self, base: BaseModel, layers: Sequence[int], source: Source[Detector], default: str | None) -> None:
        self._base = base
        self._layers = layers
        self._default = default
        self.library = Library(base.name, "detector", source, self._check)

    async def read(self) -> Aliases:
        """Read the registry as `Library.read` does; an engine that captures nothing wants no detectors."""
        return await self.library.read() if self._layers else {}

    async def chosen(self, wishes: Wishes, prefix: Prefix | None, request: dict[str, Any]) -> Watch:
        """Who watches a request that `prefix` steers. Raises NotFoundError for a detector that there is not."""
        if wishes.detector == OFF:
            return Watch(reason="the request asked for none")
        if not self._layers:
            return Watch(status="unavailable", reason=UNSEEN)
        if request.get("use_beam_search"):
            return Watch(status="unavailable", reason="answers of a beam search are not scored")
        choice = await self._named(wishes.detector) if wishes.detector else await self._own(prefix)
        if choice.detector is None:
            return Watch(reason=choice.reason)
        return Watch(
            choice.detector,
            alarms=wishes.alarms,
            running=wishes.running_risk and request.get("stream") is True,
            warning=_warning(choice.detector.part, prefix),
        )

    async def _named(self, name: str) -> Choice:
        name, _, ref = name.partition("@")
        return Choice(await self.library.find(name, ref or None))

    async def _own(self, prefix: Prefix | None) -> Choice:
        if self._default:
            return await self._named(self._default)
        champions = self.library.champions()
        fitted = [c for c in champions if prefix and c.part.card.prefix == prefix.card.digest]
        fitting = fitted or [c for c in champions if c.part.card.prefix is None] or champions
        if len(fitting) == 1:
            return Choice(fitting[0])
        if not fitting:
            return Choice(None, f"{self._base.name} has no champion among its detectors")
        names = ", ".join(sorted(c.known.name for c in fitting))
        return Choice(
            None, f"several detectors are champions ({names}): name one in trimtab.detector, or serve with --detector"
        )

    def _check(self, detector: Detector) -> None:
        check_base(detector.card, self._base)
        if missing := sorted(set(detector.card.layers) - set(self._layers)):
            captured = ", ".join(map(str, self._layers))
            raise ArtefactError(
                f"detector {detector.card.name!r} reads layer {missing[0]}; this server captures {captured}: "
                "start it again to have others"
            )


def _warning(detector: Detector, prefix: Prefix | None) -> str | None:
    fitted, steered = detector.card.prefix, prefix.card.digest if prefix else None
    if fitted == steered:
        return None
    if steered is None:
        return "the detector was fitted to answers under a prefix, and this one has none"
    return f"the detector was fitted {'without a prefix' if fitted is None else 'under another prefix'}"
