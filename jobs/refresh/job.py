"""Job of `trimtab refresh`: new labels, training, gate, shadow phase and promotion of a detector.

trimtab refresh truth --signals collected signals/base-0f3a9c27d1be
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from trimtab.cli.console import print_line
from trimtab.detection.detector_card import select_threshold
from trimtab.detection.live_labels import EVIDENCE
from trimtab.detection.merged_dataset import count_trusted_labels, merge_datasets, read_datasets
from trimtab.detection.signal_dataset import SignalDataset
from trimtab.errors import UsageError
from trimtab.jobs.detect.config import DetectConfig
from trimtab.jobs.detect.job import train_detectors
from trimtab.jobs.promote.detector_metrics import compute_risk_at
from trimtab.jobs.refresh.config import RefreshConfig
from trimtab.jobs.runtime.config import as_source_list
from trimtab.model.base_model import BaseModel, resolve_base_model
from trimtab.stats.intervals import Rate, compute_wilson_interval
from trimtab.tracking import registry
from trimtab.tracking.promotions import promote_version, read_decision, record_decision
from trimtab.tracking.registry import Version
from trimtab.tracking.run_artifacts import read_json_artifact

RefreshStatus = Literal["waiting", "rejected", "shadow", "promoted"]
"""`waiting` for labels, `rejected` by the gate or in the shadow phase, in the `shadow` phase, or `promoted`."""


@dataclass(frozen=True)
class RefreshResult:
    """Result of one call of refresh.

    Attributes:
        status: state of the refresh after the call, or before it in a dry run.
        reason: explanation, with the figures.
        version: version that the state is about; None before the first training.
        next_step: step of a dry run that a call would do; None otherwise.
    """

    status: RefreshStatus
    reason: str
    version: int | None
    next_step: str | None = None


@dataclass(frozen=True)
class ShadowComparison:
    """Verdicts of a candidate on answers that were stored after its training.

    Attributes:
        answers: number of answers.
        flagged: share that the candidate flags.
        champion: share that the champion flags; None without a champion.
        changed: share of different verdicts; None without a champion.
    """

    answers: int
    flagged: Rate
    champion: Rate | None
    changed: Rate | None

    def __str__(self) -> str:
        text = f"{self.answers} answers, flagged {self.flagged}"
        return text if self.champion is None else f"{text}, champion {self.champion}, verdict changed {self.changed}"


def refresh_detector(config: RefreshConfig) -> RefreshResult:
    """Do the next step: train on new labels, or end the shadow phase of the candidate.

    Raises:
        UsageError: if no data set is of live traffic, or the data sets cannot be merged.
        TrimtabError: if training fails or the registry cannot be reached.
    """
    base = resolve_base_model(config.base, config.revision)
    data = _read_data(config, base)
    candidate = registry.find_alias(base.name, config.name, registry.CANDIDATE)
    evidence = read_json_artifact(candidate.run_id, EVIDENCE) if candidate else {}
    if candidate and _is_in_shadow(candidate, evidence):
        return _end_shadow(config, base, data, candidate, float(evidence["until"]))
    labels = count_trusted_labels(data)
    new = labels - int(evidence.get("labels", 0))
    if new < config.min_labels:
        reason = f"{new} new labels of trusted raters; a training needs {config.min_labels}"
        return RefreshResult("waiting", reason, candidate.version if candidate else None)
    if config.dry_run:
        return RefreshResult("waiting", f"{new} new labels of trusted raters", None, "train")
    return _train(config)


def run_refresh(config: RefreshConfig) -> dict[str, Any]:
    """Do the next step of a refresh and print the result.

    Returns:
        Output of `--json`.
    """
    result = refresh_detector(config)
    version = f" version {result.version}" if result.version else ""
    after = f". Next step: {result.next_step}" if result.next_step else ""
    print_line(f"{config.name}{version}: {result.status}: {result.reason}{after}")
    return asdict(result)


def _read_data(config: RefreshConfig, base: BaseModel) -> SignalDataset:
    folders = as_source_list(config.signals)
    merged = merge_datasets(read_datasets(folders, base))
    if not merged.is_live.any():
        names = ", ".join(folders)
        raise UsageError(f"{names}: no stored answers. Add a data set in the folder of trimtab serve --keep_signals")
    return merged


def _is_in_shadow(candidate: Version, evidence: Any) -> bool:
    """Return whether a candidate has passed the gate of a refresh and is not champion."""
    decision = read_decision(candidate)
    champion = registry.find_champion(candidate.base, candidate.name)
    is_champion = champion is not None and champion.version >= candidate.version
    return bool(evidence) and bool(decision and decision["passed"]) and not is_champion


def _train(config: RefreshConfig) -> RefreshResult:
    detected = train_detectors(
        DetectConfig(
            signals=config.signals,
            signal_weights=config.signal_weights,
            head=config.head,
            layers=config.layers,
            num_seeds=config.num_seeds,
            reserved_fraction=config.reserved_fraction,
            name=config.name,
            gate=config.gate,
            promote=config.shadow_answers == 0,
            base=config.base,
            revision=config.revision,
            address=config.address,
        )
    )
    version = detected.version
    if version is None or not (read_decision(version) or {}).get("passed"):
        return RefreshResult("rejected", detected.gate or "", version.version if version else None)
    if config.shadow_answers == 0:
        return RefreshResult("promoted", detected.gate or "", version.version)
    return RefreshResult("shadow", f"{detected.gate}; 0 of {config.shadow_answers} answers", version.version)


def _end_shadow(config: RefreshConfig, base: BaseModel, data: SignalDataset, candidate: Version, until: float) -> RefreshResult:
    """Promote or reject a candidate if enough answers have been stored since its training."""
    later = data.select_later(until)
    if len(later.keys) < config.shadow_answers:
        reason = f"{len(later.keys)} of {config.shadow_answers} answers after the training"
        return RefreshResult("shadow", reason, candidate.version)
    comparison = compare_verdicts(base, candidate, later)
    passed = comparison.flagged.low <= config.max_flagged
    step = "promote" if passed else "reject"
    if config.dry_run:
        return RefreshResult("shadow", str(comparison), candidate.version, step)
    if not passed:
        reason = f"flags too many answers (at most {config.max_flagged:g}): {comparison}"
        record_decision(candidate, passed=False, reason=reason)
        return RefreshResult("rejected", reason, candidate.version)
    reason = f"refresh: {comparison}"
    promote_version(candidate, reason)
    return RefreshResult("promoted", reason, candidate.version)


def compare_verdicts(base: BaseModel, candidate: Version, data: SignalDataset) -> ShadowComparison:
    """Compare the verdicts of a candidate with those of the champion, each at its default threshold.

    Args:
        base: base model.
        candidate: candidate.
        data: answers that were stored after its training.
    """
    champion = registry.find_champion(candidate.base, candidate.name)
    detectors = [registry.load_detector(version, base) for version in (candidate, champion) if version is not None]
    rows = data.times.argsort()
    own, *other = [compute_risk_at(d, data, rows) > select_threshold(d.card) for d in detectors]
    count = len(rows)
    shares = [compute_wilson_interval(int(flags.sum()), count) for flags in (own, *other)]
    changed = compute_wilson_interval(int((own != other[0]).sum()), count) if other else None
    return ShadowComparison(count, shares[0], shares[1] if other else None, changed)
