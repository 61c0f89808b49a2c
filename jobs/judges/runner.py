"""Judge runner with a cache of verdicts.

A judge never judges the same answer twice, because verdicts of an endpoint cost money.
"""

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
from trimtab.text.refusal_phrases import remove_reasoning
from trimtab.types import VERDICTS, Verdict
from trimtab.util.identifiers import compute_key

AnswerPair = tuple[str, str]
"""Prompt and its answer."""


@dataclass(frozen=True)
class VerdictCache:
    """Append-only cache of the verdicts of one judge, shared by all jobs.

    Attributes:
        judge: key of the judge.
    """

    judge: str

    def read_verdicts(self, pairs: Iterable[AnswerPair]) -> dict[AnswerPair, Verdict]:
        """Return the cached verdicts of these pairs; skip lines that a crash truncated."""
        pairs_by_key = {_compute_key(pair): pair for pair in pairs}
        cached: dict[AnswerPair, Verdict] = {}
        for row in read_jsonl(self._file):
            verdict: Verdict | None = next((v for v in VERDICTS if v == row["verdict"]), None)
            if verdict and row["key"] in pairs_by_key:
                cached[pairs_by_key[row["key"]]] = verdict
        return cached

    def write_verdicts(self, pairs: Sequence[AnswerPair], verdicts: Sequence[Verdict]) -> None:
        """Append the verdicts of these pairs."""
        append_jsonl(
            self._file,
            ({"key": _compute_key(pair), "verdict": verdict} for pair, verdict in zip(pairs, verdicts, strict=True)),
        )

    @property
    def _file(self) -> Path:
        return settings.get_home() / "verdicts" / f"{compute_key(self.judge, 20)}.jsonl"


def _compute_key(pair: AnswerPair) -> str:
    return compute_key(json.dumps(pair), 24)


# Verdicts of an endpoint per write to the cache; a crash loses at most one chunk.
CHUNK = 64
CROSS_VALIDATED = "cross-validated: no answer was judged by a head that was fitted on it"


def open_judge(config: JudgeConfig, base: BaseModel, gpus: float = 0) -> Judge:
    """Open the configured judge.

    Args:
        config: configuration of the judge.
        base: base model of a classifier.
        gpus: number of GPUs; any above 0 runs a classifier on the GPU.

    Raises:
        TrimtabError: if a classifier cannot be used or the URL of an endpoint is invalid.
    """
    if config.kind == "classifier":
        return RefusalClassifier(load_head(Path(config.folder or ""), base), base, "cuda" if gpus else "cpu")
    if config.kind == "endpoint":
        return build_refusal_judge(config)
    return StringMatch()


def build_refusal_judge(config: JudgeConfig) -> LlmRefusalJudge:
    """Open the configured endpoint, which needs no base model.

    Raises:
        UsageError: if the URL is invalid.
    """
    return LlmRefusalJudge(config.url or "", config.model or "", config.max_concurrency)


def compute_standing(judge: Judge) -> JudgeStanding:
    """Measure the agreement of a judge with the human labels.

    An endpoint judges the labeled answers once; later calls use the cache.

    Raises:
        JobError: if an endpoint does not respond. Callers call this before long work, to fail early.
    """
    if isinstance(judge, RefusalClassifier):
        return JudgeStanding(judge.name, judge.head.list_agreements(), CROSS_VALIDATED)
    try:
        rows = read_human_labels()
    except AssetError as error:
        return JudgeStanding(judge.name, note=f"human labels are unavailable: {error}")
    verdicts = judge_cached(judge, [(row.prompt, row.answer) for row in rows])
    return JudgeStanding(judge.name, compute_label_agreements(verdicts, rows))


def apply_judge(results: Mapping[str, Sequence[ArmResult]], judge: Judge, gpus: float = 0) -> dict[str, list[ArmResult]]:
    """Replace the verdicts of the string match by those of a judge.

    Args:
        results: results of every arm, by part.
        judge: judge of the answers.
        gpus: number of GPUs for a classifier.

    Returns:
        Results with the same answers and the verdicts of `judge`.
    """
    if isinstance(judge, StringMatch):
        return {part: list(arms) for part, arms in results.items()}
    judged = [j for arms in results.values() for arm in arms for j in arm.answers]
    verdicts = iter(judge_cached(judge, [(get_judged_prompt(j.prompt), j.answer) for j in judged], gpus))

    def rejudge(arm: ArmResult) -> ArmResult:
        return summarize_answers(arm.name, [replace(j, verdict=next(verdicts)) for j in arm.answers])

    return {part: [rejudge(arm) for arm in arms] for part, arms in results.items()}


def judge_cached(judge: Judge, pairs: Sequence[AnswerPair], gpus: float = 0) -> list[Verdict]:
    """Return one verdict per pair; only pairs without a cached verdict are judged. The reasoning of answers is not judged.

    Raises:
        TrimtabError: if the judge fails.
    """
    pairs = [(prompt, remove_reasoning(answer)) for prompt, answer in pairs]
    if isinstance(judge, StringMatch):
        return judge.judge_answers([p for p, _ in pairs], [a for _, a in pairs])
    cache = VerdictCache(judge.key)
    verdicts = cache.read_verdicts(pairs)
    missing = [pair for pair in dict.fromkeys(pairs) if pair not in verdicts]
    if isinstance(judge, RefusalClassifier) and missing:
        texts = [p for p, _ in missing], [a for _, a in missing]
        task = "trimtab.jobs.judges.tasks:classify_answers"
        new = run_task("verdicts of the classifier", task, judge, *texts, cpus=get_max_node_cores(), gpus=gpus)
        cache.write_verdicts(missing, new)
        verdicts |= dict(zip(missing, new, strict=True))
    elif missing:
        with ProgressBar(f"verdicts of {judge.name}", len(missing)) as bar:
            for start in range(0, len(missing), CHUNK):
                chunk = missing[start : start + CHUNK]
                new = judge.judge_answers([p for p, _ in chunk], [a for _, a in chunk])
                cache.write_verdicts(chunk, new)
                verdicts |= dict(zip(chunk, new, strict=True))
                bar.update(start + len(chunk))
    return [verdicts[pair] for pair in pairs]


def get_judged_prompt(prompt: Prompt) -> str:
    """Return the text of a prompt for a judge, including the earlier turns of a conversation."""
    turns = [f"{role}: {content}" for role, content in prompt.history]
    return "\n\n".join([*turns, f"user: {prompt.prompt}"]) if turns else prompt.prompt
