"""Verdicts that are kept, so that no answer is judged twice by the same judge: those of an endpoint cost money."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from trimtab import ray_connection, settings
from trimtab.cli.console import Bar
from trimtab.data.prompt import Prompt
from trimtab.errors import AssetError
from trimtab.evaluation.safety.results import ArmResult, summarise
from trimtab.jobs.judges.config import JudgeConfig
from trimtab.jobs.runtime import jsonl
from trimtab.jobs.runtime.cluster import run_task
from trimtab.judges import Judge, human_labels, refusal_head
from trimtab.judges.human_agreement import Standing, on_human_labels
from trimtab.judges.llm_refusal import Endpoint
from trimtab.judges.refusal_classifier import Classifier
from trimtab.judges.string_match import StringMatch
from trimtab.model.base_model import BaseModel
from trimtab.types import VERDICTS, Verdict

Pair = tuple[str, str]
"""A prompt and an answer to it."""


@dataclass(frozen=True)
class Verdicts:
    """The verdicts of one judge, by its key: a file of lines that is only added to, shared by all that judge."""

    judge: str

    def read(self, pairs: Iterable[Pair]) -> dict[Pair, Verdict]:
        """What is known of these pairs. A line that was cut off by a crash is skipped."""
        wanted = {_digest(pair): pair for pair in pairs}
        found: dict[Pair, Verdict] = {}
        for row in jsonl.read(self._file):
            verdict: Verdict | None = next((v for v in VERDICTS if v == row["verdict"]), None)
            if verdict and row["key"] in wanted:
                found[wanted[row["key"]]] = verdict
        return found

    def keep(self, pairs: Sequence[Pair], verdicts: Sequence[Verdict]) -> None:
        """Add verdicts."""
        jsonl.append(
            self._file,
            ({"key": _digest(pair), "verdict": verdict} for pair, verdict in zip(pairs, verdicts, strict=True)),
        )

    @property
    def _file(self) -> Path:
        return settings.home() / "verdicts" / f"{hashlib.sha256(self.judge.encode()).hexdigest()[:20]}.jsonl"


def _digest(pair: Pair) -> str:
    return hashlib.sha256(json.dumps(pair).encode()).hexdigest()[:24]


# Verdicts of an endpoint that are kept at a time: what a crash can lose.
CHUNK = 64
CROSS_VALIDATED = "cross-validated: each answer was judged by a head that was not fitted on it"


def opened(config: JudgeConfig, base: BaseModel, gpus: float = 0) -> Judge:
    """The judge that the settings name. Raises errors of ours for a classifier that cannot be used, and a URL that is none."""
    if config.kind == "classifier":
        return Classifier(refusal_head.load(Path(config.folder or ""), base), base, "cuda" if gpus else "cpu")
    if config.kind == "endpoint":
        return endpoint(config)
    return StringMatch()


def endpoint(config: JudgeConfig) -> Endpoint:
    """The endpoint that the settings name: it needs no base model. Raises UsageError."""
    return Endpoint(config.url or "", config.model or "", config.concurrency)


def standing(judge: Judge) -> Standing:
    """How a judge stands against the human labels; an endpoint is asked about them, once.

    Raises JobError where it does not answer, so that this is known before anything long is begun."""
    if isinstance(judge, Classifier):
        return Standing(judge.name, judge.head.agreements(), CROSS_VALIDATED)
    try:
        rows = human_labels.read()
    except AssetError as error:
        return Standing(judge.name, note=f"no human labels here: {error}")
    verdicts = give(judge, [(row.prompt, row.answer) for row in rows])
    return Standing(judge.name, on_human_labels(verdicts, rows))


def rejudged(results: Mapping[str, Sequence[ArmResult]], judge: Judge, gpus: float = 0) -> dict[str, list[ArmResult]]:
    """The same answers with this judge's verdicts in the place of the string match's."""
    if isinstance(judge, StringMatch):
        return {part: list(arms) for part, arms in results.items()}
    everything = [j for arms in results.values() for arm in arms for j in arm.answers]
    verdicts = iter(give(judge, [(asked(j.prompt), j.answer) for j in everything], gpus))

    def again(arm: ArmResult) -> ArmResult:
        return summarise(arm.name, [replace(j, verdict=next(verdicts)) for j in arm.answers])

    return {part: [again(arm) for arm in arms] for part, arms in results.items()}


def give(judge: Judge, pairs: Sequence[Pair], gpus: float = 0) -> list[Verdict]:
    """One verdict for each pair; what this judge has judged before is not judged again."""
    if isinstance(judge, StringMatch):
        return judge.judge([p for p, _ in pairs], [a for _, a in pairs])
    store = Verdicts(judge.key)
    known = store.read(pairs)
    missing = [pair for pair in dict.fromkeys(pairs) if pair not in known]
    if isinstance(judge, Classifier) and missing:
        texts = [p for p, _ in missing], [a for _, a in missing]
        task = "trimtab.jobs.judges.tasks:classify"
        found = run_task("verdicts of the classifier", task, judge, *texts, cpus=ray_connection.cores(), gpus=gpus)
        store.keep(missing, found)
        known |= dict(zip(missing, found, strict=True))
    elif missing:
        with Bar(f"verdicts of {judge.name}", len(missing)) as bar:
            for begin in range(0, len(missing), CHUNK):
                chunk = missing[begin : begin + CHUNK]
                found = judge.judge([p for p, _ in chunk], [a for _, a in chunk])
                store.keep(chunk, found)
                known |= dict(zip(chunk, found, strict=True))
                bar.update(begin + len(chunk))
    return [known[pair] for pair in pairs]


def asked(prompt: Prompt) -> str:
    """What a judge is told of a prompt: its text, and where it stands in a conversation the turns before it."""
    turns = [f"{role}: {content}" for role, content in prompt.history]
    return "\n\n".join([*turns, f"user: {prompt.prompt}"]) if turns else prompt.prompt
