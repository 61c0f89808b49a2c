"""Risks of the answers to one HTTP request, the verdicts on its prompts, and selection of the detector of answers."""

from collections.abc import Collection, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from trimtab.artifacts.prefix import Prefix
from trimtab.detection.detector import Detector, check_base
from trimtab.engine.detectors.answer_verdicts import AnswerVerdicts
from trimtab.engine.detectors.prompt_verdicts import PromptVerdicts
from trimtab.engine.extensions import RequestOptions
from trimtab.engine.prefixes.catalog import AliasVersions, VersionCatalog
from trimtab.engine.prefixes.version_loader import ArtifactSource, LoadedVersion
from trimtab.engine.recording import AnswerSignals, PromptSignals
from trimtab.errors import ArtifactError, UsageError
from trimtab.model.base_model import BaseModel
from trimtab.types import Subject
from trimtab.util.identifiers import split_reference


@dataclass
class RequestRisk:
    """Detector of a request, and the risks of its answers.

    Attributes:
        detector: detector of the answers; None if there is none.
        status: status in the response if there is no detector: `off` or `unavailable`.
        reason: reason for the absence of a detector.
        fpr_key: false positive rate that selects the detector's threshold, as a key of the card.
        running: whether to compute risks of unfinished answers.
        warning: reason why the risks may be miscalibrated.
        shadow: whether the request is shadow traffic, whose answer is discarded.
        supplied_tokens: number of tokens of a supplied answer; 0 if the engine generates the answer.
        risks: known risks by index of the choice.
        ids: engine ids by request id.
        choices: number of choices.
        ended: number of choices that have ended.
        tokens: number of tokens generated so far.
        verdicts: policies on the prompts, and their verdicts.
        answers: policies on the answers, and their verdicts.
        requested: policies on the answers without that of the field `trimtab.policy`, whose detector depends on the prefix.
        stored: whether the signals of the prompt, of the answers, or of both are collected in `prompt` and `recorded`.
        recorded: signals of the answers that have ended, by index of the choice.
        prompt: signals of the prompt as the model has read it first; None before, and if they are not collected.
    """

    detector: LoadedVersion[Detector] | None = None
    status: str = "off"
    reason: str | None = None
    fpr_key: str = "0.05"
    running: bool = False
    warning: str | None = None
    shadow: bool = False
    supplied_tokens: int = 0
    risks: dict[int, float] = field(default_factory=dict[int, float])
    ids: dict[str, str] = field(default_factory=dict[str, str])
    choices: int = 0
    ended: int = 0
    tokens: int = 0
    verdicts: PromptVerdicts = field(default_factory=PromptVerdicts)
    answers: AnswerVerdicts = field(default_factory=AnswerVerdicts)
    requested: AnswerVerdicts = field(default_factory=AnswerVerdicts)
    stored: Collection[Subject] = ()
    recorded: dict[int, AnswerSignals] = field(default_factory=dict[int, AnswerSignals])
    prompt: PromptSignals | None = None

    def copy_settings(self, *, shadow: bool = False) -> "RequestRisk":
        """Return a RequestRisk with the same detector, policies and settings, and without risks."""
        copy = RequestRisk(self.detector, self.status, self.reason, self.fpr_key, self.running, self.warning, shadow)
        # The answers of shadow traffic are discarded, so that no policy has to act on them.
        if not shadow:
            copy.verdicts, copy.answers = self.verdicts.copy_policies(), self.answers.copy_policies()
            copy.requested, copy.stored = self.requested, self.stored
        return copy

    def list_worker_detectors(self) -> list[Detector]:
        """Return the detectors that the engine's worker applies."""
        return [*self.verdicts.list_detectors(), *self.answers.list_detectors()]

    @property
    def reads_answers(self) -> bool:
        """Whether the signals of the answers are needed."""
        return self.detector is not None or bool(self.answers.policies) or "answer" in self.stored

    @property
    def stores_prompt(self) -> bool:
        """Whether the signals of the prompt are still needed."""
        return "prompt" in self.stored and self.prompt is None

    @property
    def label(self) -> str | None:
        """Label NAME@VERSION of the detector."""
        return f"{self.detector.version.name}@{self.detector.version.version}" if self.detector else None

    @property
    def threshold(self) -> float | None:
        """Risk above which an answer is flagged."""
        return self.detector.artifact.card.thresholds[self.fpr_key] if self.detector else None

    def as_notes(self) -> dict[str, Any]:
        """Return the fields of the access log's record about the answers."""
        labels = [*self.verdicts.list_labels(0), *self.answers.list_labels(0)]
        return {"tokens": self.tokens, "detector": self.label, "risk": self.risks.get(0), "verdicts": labels or None}

    def describe_choice(self, index: int) -> dict[str, Any]:
        """Return the `trimtab` field of a choice: the probability of the detector of answers. Empty if it is unknown."""
        risk, threshold = self.risks.get(index), self.threshold
        if self.detector is None or risk is None or threshold is None:
            return {}
        version = self.detector.version
        verdict = {"probability": round(risk, 4), "flagged": risk > threshold}
        return {"detectors": [{"name": version.name, "version": version.version} | verdict]}

    def as_json(self) -> list[dict[str, Any]]:
        """Return the `trimtab.detectors` field of a response: the detector of answers, then one entry per policy.

        With several choices it describes the first one.
        """
        entries = [*self.verdicts.describe(0), *self.answers.describe(0)]
        return [*self._describe_answer(), *(EMPTY | entry for entry in entries)]

    def _describe_answer(self) -> list[dict[str, Any]]:
        if self.detector is None:
            return [EMPTY | {"status": self.status, "reason": self.reason}]
        version = self.detector.version
        entry = EMPTY | {"name": version.name, "version": version.version, "run_id": version.run_id}
        entry |= {"threshold": self.threshold, "false_positive_rate": float(self.fpr_key), "warning": self.warning}
        if first := self.describe_choice(0):
            return [entry | first["detectors"][0] | {"status": "scored"}]
        pending = self.ended < self.choices
        reason = "other choices have not ended" if pending else "the engine has no signals of this answer"
        return [entry | {"status": "unavailable", "reason": reason}]


current_risk: ContextVar[RequestRisk | None] = ContextVar("current_risk", default=None)
"""Detector and risks of the HTTP request that this task answers."""

OFF = "off"
# All fields of an entry of `trimtab.detectors`, in the order of the response.
EMPTY: dict[str, Any] = {
    "name": None,
    "version": None,
    "run_id": None,
    "subject": "answer",
    "label": None,
    "status": "off",
    "probability": None,
    "flagged": None,
    "threshold": None,
    "false_positive_rate": None,
    "reason": None,
    "warning": None,
    "action": None,
}
UNSEEN = "this server captures no signals: it had no detector when it started, or was started with --detect false"


@dataclass(frozen=True)
class DetectorChoice:
    """Result of the selection: a detector, or the `reason` for the absence of one."""

    detector: LoadedVersion[Detector] | None
    reason: str = ""


class DetectorSelector:
    """Selection of a detector for each request.

    Args:
        base: base model of the engine.
        layers: layers that the engine captures; empty disables detection.
        source: source of the detectors.
        default: detector of requests that name none: NAME, NAME@ALIAS or NAME@VERSION. If None, the champion that was fitted
            under the request's prefix is used, otherwise the only champion fitted without one, otherwise the only champion.
        token_statistics: whether the engine stores the statistics of tokens.
    """

    def __init__(
        self,
        base: BaseModel,
        layers: Sequence[int],
        source: ArtifactSource[Detector],
        default: str | None,
        *,
        token_statistics: bool,
    ) -> None:
        self._base = base
        self._layers = layers
        self._token_statistics = token_statistics
        self._default = default
        self.library = VersionCatalog(base.name, "detector", source, self._check)

    async def refresh(self) -> AliasVersions:
        """Refresh the catalog as in `VersionCatalog.refresh`. An engine that captures no layers has no detectors."""
        return await self.library.refresh() if self._layers else {}

    def list_aliases(self, subject: Subject) -> Mapping[str, Mapping[str, int]]:
        """Return the detectors of a subject with their aliases and version numbers."""
        prompts = {loaded.version.name for loaded in self.library.list_aliased() if loaded.artifact.card.subject == "prompt"}
        wanted = subject == "prompt"
        return {name: aliases for name, aliases in self.library.list_aliases().items() if (name in prompts) == wanted}

    async def select_detector(self, options: RequestOptions, prefix: Prefix | None, request: dict[str, Any]) -> RequestRisk:
        """Select the detector of a request.

        Args:
            options: options of the request.
            prefix: prefix of the request; None for the plain base model.
            request: request body.

        Raises:
            NotFoundError: if the request names an unknown detector.
            ArtifactError: if the detector cannot be used.
            UsageError: if the request names a detector of prompts.
        """
        if options.detector == OFF:
            return RequestRisk(reason="the request disabled detection")
        if not self._layers:
            return RequestRisk(status="unavailable", reason=UNSEEN)
        if request.get("use_beam_search"):
            return RequestRisk(status="unavailable", reason="answers of a beam search are not scored")
        choice = await self._find_named(options.detector) if options.detector else await self._find_default(prefix)
        if choice.detector is None:
            return RequestRisk(reason=choice.reason)
        return RequestRisk(
            choice.detector,
            fpr_key=options.fpr_key,
            running=options.running_risk and request.get("stream") is True,
            warning=describe_mismatch(choice.detector.artifact, prefix),
        )

    async def _find_named(self, name: str) -> DetectorChoice:
        loaded = await self.library.find(*split_reference(name))
        if loaded.artifact.card.subject != "answer":
            raise UsageError(f"detector {name!r} reads prompts. Name it in trimtab.policies")
        return DetectorChoice(loaded)

    async def _find_default(self, prefix: Prefix | None) -> DetectorChoice:
        if self._default:
            return await self._find_named(self._default)
        champions = [c for c in self.library.list_champions() if c.artifact.card.subject == "answer"]
        fitted = [c for c in champions if prefix and c.artifact.card.prefix_digest == prefix.card.digest]
        matching = fitted or [c for c in champions if c.artifact.card.prefix_digest is None] or champions
        if len(matching) == 1:
            return DetectorChoice(matching[0])
        if not matching:
            return DetectorChoice(None, f"{self._base.name} has no champion among its detectors of answers")
        names = ", ".join(sorted(c.version.name for c in matching))
        return DetectorChoice(
            None, f"several detectors are champions ({names}). Name one in trimtab.detector, or serve with --detector"
        )

    def _check(self, detector: Detector) -> None:
        check_base(detector.card, self._base)
        if missing := sorted(set(detector.card.layers) - set(self._layers)):
            captured = ", ".join(map(str, self._layers))
            raise ArtifactError(
                f"detector {detector.card.name!r} reads layer {missing[0]}; this server captures {captured}. "
                "Restart the server to capture other layers"
            )
        if detector.reads_trace and not self._token_statistics:
            raise ArtifactError(
                f"detector {detector.card.name!r} reads statistics of tokens; this server computes none. Restart it, or "
                "set --engine.token_statistics true"
            )


def describe_mismatch(detector: Detector, prefix: Prefix | None) -> str | None:
    """Return why a detector may be miscalibrated for requests with a prefix, or without one; None if it fits."""
    fitted, steered = detector.card.prefix_digest, prefix.card.digest if prefix else None
    if fitted == steered:
        return None
    if steered is None:
        return "the detector was fitted under a prefix, but this request has none"
    return f"the detector was fitted {'without a prefix' if fitted is None else 'under another prefix'}"
