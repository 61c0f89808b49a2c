"""Which detector watches a request: the one that it names, else the server's own choice."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trimtab.base import BaseModel
from trimtab.detector import Detector, check_base
from trimtab.engine.library import Aliases, Library, Loaded, Source
from trimtab.engine.watch import Watch
from trimtab.engine.wishes import Wishes
from trimtab.errors import ArtefactError
from trimtab.prefix import Prefix

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
