"""Risks of the answers to one HTTP request."""

from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from trimtab.artifacts.prefix import Prefix
from trimtab.detection.detector import Detector, check_base
from trimtab.engine.extensions import RequestOptions
from trimtab.engine.prefixes.catalog import AliasVersions, ArtifactSource, LoadedVersion, VersionCatalog
from trimtab.errors import ArtifactError
from trimtab.model.base_model import BaseModel


@dataclass
class RequestRisk:
    """Who watches the answers to a request: a detector, or nobody for a `reason`.

    `alarms` is the share of false alarms that its threshold is chosen by; `running` gives risks of answers that are not done;
    `warning` says why risks may be off; `shadow` that nobody gets the answer; `given` is the number of tokens of an answer that
    someone else wrote. `risks` are by the choices' indices, as far as they are known, of which so many have `ended`; `tokens`
    were written so far.
    """

    detector: LoadedVersion[Detector] | None = None
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

    def copy_settings(self, *, shadow: bool = False) -> "RequestRisk":
        """The same watcher, for another answer."""
        return RequestRisk(self.detector, self.status, self.reason, self.alarms, self.running, self.warning, shadow)

    @property
    def label(self) -> str | None:
        """The detector's name and version."""
        return f"{self.detector.version.name}@{self.detector.version.version}" if self.detector else None

    @property
    def threshold(self) -> float | None:
        """The risk above which an answer is flagged."""
        return self.detector.artifact.card.thresholds[self.alarms] if self.detector else None

    def describe_choice(self, index: int) -> dict[str, Any]:
        """What a choice says of its risk; nothing where that is not known."""
        risk, threshold = self.risks.get(index), self.threshold
        return {} if risk is None or threshold is None else {"risk": round(risk, 4), "flagged": risk > threshold}

    def as_json(self) -> dict[str, Any]:
        """The response's `trimtab.detector`: of its first choice, where there are several."""
        if self.detector is None:
            return {"status": self.status} | ({"reason": self.reason} if self.reason else {})
        known = self.detector.version
        named = {"name": known.name, "version": known.version, "run_id": known.run_id}
        said = named | {"false_alarms": float(self.alarms), "threshold": self.threshold}
        said |= {"warning": self.warning} if self.warning else {}
        if (first := self.describe_choice(0)) == {}:
            pending = {"status": "unavailable", "reason": "other choices are not done"}
            missing = {"status": "unavailable", "reason": "the engine has no signals of this answer"}
            return (pending if self.ended < self.choices else missing) | said
        return {"status": "scored"} | first | said


current_risk: ContextVar[RequestRisk | None] = ContextVar("watching", default=None)
"""Who watches the HTTP request that this task answers."""

OFF = "off"
UNSEEN = "this server captures no signals: it had no detector when it started, or was started with --detect false"


@dataclass(frozen=True)
class DetectorChoice:
    """A detector, or none for a `reason`."""

    detector: LoadedVersion[Detector] | None
    reason: str = ""


class DetectorSelector:
    """The detectors of a server whose engine captures `layers` of `base`. `default` names the one that watches where a request
    names none; without it, the champion that was fitted under the request's prefix, else the only champion."""

    def __init__(self, base: BaseModel, layers: Sequence[int], source: ArtifactSource[Detector], default: str | None) -> None:
        self._base = base
        self._layers = layers
        self._default = default
        self.library = VersionCatalog(base.name, "detector", source, self._check)

    async def refresh(self) -> AliasVersions:
        """Read the registry as `Library.read` does; an engine that captures nothing wants no detectors."""
        return await self.library.refresh() if self._layers else {}

    async def select_detector(self, wishes: RequestOptions, prefix: Prefix | None, request: dict[str, Any]) -> RequestRisk:
        """Who watches a request that `prefix` steers. Raises NotFoundError for a detector that there is not."""
        if wishes.detector == OFF:
            return RequestRisk(reason="the request asked for none")
        if not self._layers:
            return RequestRisk(status="unavailable", reason=UNSEEN)
        if request.get("use_beam_search"):
            return RequestRisk(status="unavailable", reason="answers of a beam search are not scored")
        choice = await self._find_named(wishes.detector) if wishes.detector else await self._find_default(prefix)
        if choice.detector is None:
            return RequestRisk(reason=choice.reason)
        return RequestRisk(
            choice.detector,
            alarms=wishes.alarms,
            running=wishes.running_risk and request.get("stream") is True,
            warning=_describe_mismatch(choice.detector.artifact, prefix),
        )

    async def _find_named(self, name: str) -> DetectorChoice:
        name, _, ref = name.partition("@")
        return DetectorChoice(await self.library.find(name, ref or None))

    async def _find_default(self, prefix: Prefix | None) -> DetectorChoice:
        if self._default:
            return await self._find_named(self._default)
        champions = self.library.list_champions()
        fitted = [c for c in champions if prefix and c.artifact.card.prefix == prefix.card.digest]
        fitting = fitted or [c for c in champions if c.artifact.card.prefix is None] or champions
        if len(fitting) == 1:
            return DetectorChoice(fitting[0])
        if not fitting:
            return DetectorChoice(None, f"{self._base.name} has no champion among its detectors")
        names = ", ".join(sorted(c.version.name for c in fitting))
        return DetectorChoice(
            None, f"several detectors are champions ({names}): name one in trimtab.detector, or serve with --detector"
        )

    def _check(self, detector: Detector) -> None:
        check_base(detector.card, self._base)
        if missing := sorted(set(detector.card.layers) - set(self._layers)):
            captured = ", ".join(map(str, self._layers))
            raise ArtifactError(
                f"detector {detector.card.name!r} reads layer {missing[0]}; this server captures {captured}: "
                "start it again to have others"
            )


def _describe_mismatch(detector: Detector, prefix: Prefix | None) -> str | None:
    fitted, steered = detector.card.prefix, prefix.card.digest if prefix else None
    if fitted == steered:
        return None
    if steered is None:
        return "the detector was fitted to answers under a prefix, and this one has none"
    return f"the detector was fitted {'without a prefix' if fitted is None else 'under another prefix'}"
