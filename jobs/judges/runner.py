"""Verdicts that are kept, so that no answer is judged twice by the same judge: those of an endpoint cost money."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from trimtab import settings
from trimtab.cli.console import ProgressBar
from trimtab.data.prompt import Prompt
from trimtab.errors import AssetError
from trimtab.evaluation.safety.results import ArmResult, summarize_answers
from trimtab.jobs.judges.config import JudgeConfig
from trimtab.jobs.runtime.cluster import run_task
from trimtab.jobs.runtime.jsonl import append_jsonl, read_jsonl
from trimtab.judges import Judge
from trimtab.judges.human_agreement import JudgeStanding, compute_label_agreements
from trimtab.judges.human_labels import read_human_labels
from trimtab.judges.llm_refusal import LlmRefusalJudge
from trimtab.judges.refusal_classifier import RefusalClassifier
from trimtab.judges.refusal_head import load_head
from trimtab.judges.string_match import StringMatch
from trimtab.model.base_model import BaseModel
from trimtab.ray_connection import get_max_node_cores
from trimtab.types import VERDICTS, Verdict

AnswerPair = tuple[str, str]
"""A prompt and an answer to it."""


@dataclass(frozen=True)
class VerdictCache:
    """The verdicts of one judge, by its key: a file of lines that is only added to, shared by all that judge."""

    judge: str

    def read_verdicts(self, pairs: Iterable[AnswerPair]) -> dict[AnswerPair, Verdict]:
        """What is known of these pairs. A line that was cut off by a crash is skipped."""
        wanted = {_digest(pair): pair for pair in pairs}
        found: dict[AnswerPair, Verdict] = {}
        for row in read_jsonl(self._file):
            verdict: Verdict | None = next((v for v in VERDICTS if v == row["verdict"]), None)
            if verdict and row["key"] in wanted:
                found[wanted[row["key"]]] = verdict
        return found

    def write_verdicts(self, pairs: Sequence[AnswerPair], verdicts: Sequence[Verdict]) -> None:
        """Add verdicts."""
        append_jsonl(
            self._file,
            ({"key": _digest(pair), "verdict": verdict} for pair, verdict in zip(pairs, verdicts, strict=True)),
        )

    @property
    def _file(self) -> Path:
        return settings.get_home() / "verdicts" / f"{hashlib.sha256(self.judge.encode()).hexdigest()[:20]}.jsonl"


def _digest(pair: AnswerPair) -> str:
    return hashlib.sha256(json.dumps(pair).encode()).hexdigest()[:24]


# Verdicts of an endpoint that are kept at a time: what a crash can lose.
CHUNK = 64
CROSS_VALIDATED = "cross-validated: each answer was judged by a head that was not fitted on it"


def open_judge(config: JudgeConfig, base: BaseModel, gpus: float = 0) -> Judge:
    """The judge that the settings name. Raises errors of ours for a classifier that cannot be used, and a URL that is none."""
    if config.kind == "classifier":
        return RefusalClassifier(load_head(Path(config.folder or ""), base), base, "cuda" if gpus else "cpu")
    if config.kind == "endpoint":
        return build_refusal_judge(config)
    return StringMatch()


def build_refusal_judge(config: JudgeConfig) -> LlmRefusalJudge:
    """The endpoint that the settings name: it needs no base model. Raises UsageError."""
    return LlmRefusalJudge(config.url or "", config.model or "", config.concurrency)


def compute_standing(judge: Judge) -> JudgeStanding:
    """How a judge stands against the human labels; an endpoint is asked about them, once.

    Raises JobError where it does not answer, so that this is known before anything long is begun."""
    if isinstance(judge, RefusalClassifier):
        return JudgeStanding(judge.name, judge.head.list_agreements(), CROSS_VALIDATED)
    try:
        rows = read_human_labels()
    except AssetError as error:
        return JudgeStanding(judge.name, note=f"no human labels here: {error}")
    verdicts = judge_cached(judge, [(row.prompt, row.answer) for row in rows])
    return JudgeStanding(judge.name, compute_label_agreements(verdicts, rows))


def apply_judge(results: Mapping[str, Sequence[ArmResult]], judge: Judge, gpus: float = 0) -> dict[str, list[ArmResult]]:
    """The same answers with this judge's verdicts in the place of the string match's."""
    if isinstance(judge, StringMatch):
        return {part: list(arms) for part, arms in results.items()}
    everything = [j for arms in results.values() for arm in arms for j in arm.answers]
    verdicts = iter(judge_cached(judge, [(get_judged_prompt(j.prompt), j.answer) for j in everything], gpus))

    def again(arm: ArmResult) -> ArmResult:
        return summarize_answers(arm.name, [replace(j, verdict=next(verdicts)) for j in arm.answers])

    return {part: [again(arm) for arm in arms] for part, arms in results.items()}


def judge_cached(judge: Judge, pairs: Sequence[AnswerPair], gpus: float = 0) -> list[Verdict]:
    """One verdict for each pair; what this judge has judged before is not judged again."""
    if isinstance(judge, StringMatch):
        return judge.judge_answers([p for p, _ in pairs], [a for _, a in pairs])
    store = VerdictCache(judge.key)
    known = store.read_verdicts(pairs)
    missing = [pair for pair in dict.fromkeys(pairs) if pair not in known]
    if isinstance(judge, RefusalClassifier) and missing:
        texts = [p for p, _ in missing], [a for _, a in missing]
        task = "trimtab.jobs.judges.tasks:classify_answers"
        found = run_task("verdicts of the classifier", task, judge, *texts, cpus=get_max_node_cores(), gpus=gpus)
        store.write_verdicts(missing, found)
        known |= dict(zip(missing, found, strict=True))
    elif missing:
        with ProgressBar(f"verdicts of {judge.name}", len(missing)) as bar:
            for begin in range(0, len(missing), CHUNK):
                chunk = missing[begin : begin + CHUNK]
                found = judge.judge_answers([p for p, _ in chunk], [a for _, a in chunk])
                store.write_verdicts(chunk, found)
                known |= dict(zip(chunk, found, strict=True))
                bar.update(begin + len(chunk))
    return [known[pair] for pair in pairs]


def get_judged_prompt(prompt: Prompt) -> str:
    """What a judge is told of a prompt: its text, and where it stands in a conversation the turns before it."""
    turns = [f"{role}: {content}" for role, content in prompt.history]
    return "\n\n".join([*turns, f"user: {prompt.prompt}"]) if turns else prompt.prompt
