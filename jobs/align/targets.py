"""Selection of the target answer of each training row and, if the objective needs it, of the rejected answer.

A few vectors cannot teach a new style, so a target should be likely under the frozen model (METHODS: low perplexity). It is
the most likely answer of the first rung of the target ladder that has one of the wanted kind [ours].
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from trimtab.data.hard_filter import TrainingRow
from trimtab.data.prompt import Prompt, hash_to_fraction
from trimtab.engine.config import EngineConfig
from trimtab.jobs.align.config import AlignConfig
from trimtab.jobs.align.target_ladder import LadderRequest, build_ladder_request, climb_ladder, find_accepted
from trimtab.jobs.runtime.generation_cache import CachedAnswer, generate_cached
from trimtab.model.base_model import BaseModel
from trimtab.model.chat_template import build_renderer
from trimtab.stats.intervals import Rate, compute_wilson_interval
from trimtab.text.refusal_phrases import classify_refusal

# Rejected answer of a harmful prompt if no answer of the base model complies.
HELP = "Sure! Here is what you need to do."
UNKNOWN = compute_wilson_interval(0, 0)


@dataclass(frozen=True)
class Diagnosis:
    """Behavior of the frozen model on the prompts, by its greedy answers.

    Attributes:
        benign_refused: share of the benign prompts that it refuses.
        harmful_answered: share of the harmful prompts that it does not refuse.
    """

    benign_refused: Rate = UNKNOWN
    harmful_answered: Rate = UNKNOWN


@dataclass(frozen=True)
class FilledRows:
    """Training rows with their targets, and the diagnosis of the model that produced them."""

    rows: list[TrainingRow]
    diagnosis: Diagnosis


def fill_targets(config: AlignConfig, base: BaseModel, prompts: Sequence[Prompt], rejected: bool) -> FilledRows:
    """Build a training row for each prompt; answers that are not in the cache are generated on the cluster.

    Args:
        config: settings of the job.
        base: base model that generates the answers.
        prompts: prompts with or without a target.
        rejected: whether rows also need a rejected answer.

    Raises:
        TrimtabError: if the engine rejects a request or generation fails.
    """
    requests = [plan_targets(config, prompt, rejected) for prompt in prompts]
    engine = EngineConfig(num_slots=1, dtype=config.train.dtype, max_model_len=1024)
    wanted = [request for request in requests if request]
    generated = generate_cached("target answers", base, wanted, engine, config.scale, climb_ladder)
    answers = [generated[request.key(engine.dtype)] if request else [] for request in requests]
    rows = [pick_target(config, prompt, found, rejected) for prompt, found in zip(prompts, answers, strict=True)]
    rows = limit_openings(rows, answers, config.targets.max_opening_fraction, config.data.seed)
    renderer = build_renderer(base, config.num_virtual_tokens)
    counted = [row if row.tokens else replace(row, tokens=len(renderer.render_answer(row.target))) for row in rows]
    return FilledRows(counted, diagnose_model(prompts, answers))


def plan_targets(config: AlignConfig, prompt: Prompt, rejected: bool) -> LadderRequest | None:
    """Return the request for the answers to a prompt; None if it needs none.

    Args:
        config: settings of the job.
        prompt: prompt with or without a target.
        rejected: whether the row also needs a rejected answer.
    """
    harmful = prompt.label == "harmful"
    rungs = config.targets.harmful_rungs if harmful else config.targets.benign_rungs
    if prompt.target is None and (rungs or not harmful):
        return build_ladder_request(config, prompt, "refusal" if harmful else "compliance", rungs, rejected)
    # The greedy answer of a model that does not refuse harmful prompts is a natural rejected answer.
    return build_ladder_request(config, prompt, "compliance", (), rejected) if rejected and harmful else None


def pick_target(config: AlignConfig, prompt: Prompt, answers: Sequence[CachedAnswer], rejected: bool) -> TrainingRow:
    """Select the target and the rejected answer of a prompt.

    Args:
        config: settings of the job.
        prompt: prompt of the row; its own target takes precedence.
        answers: answers of the target ladder.
        rejected: whether the row also needs a rejected answer.

    Returns:
        The training row. Its `tokens` is 0 if the tokens of the target are not counted yet.
    """
    compliance, refusal = find_accepted(answers, "compliance"), find_accepted(answers, "refusal")
    if prompt.label == "harmful":
        rejected_text = (compliance.text if compliance else HELP) if rejected else None
        if prompt.target is not None:
            return TrainingRow(prompt, prompt.target, 0, rejected=rejected_text)
        # A refusal that was cut off by the token limit is a good target: training reads no more of it.
        if refusal is not None:
            return TrainingRow(prompt, refusal.text, 0, rejected=rejected_text, origin=refusal.rung or "greedy")
        return TrainingRow(prompt, config.data.refusal, 0, rejected=rejected_text, origin="fixed")
    rejected_text = (refusal.text if refusal else config.data.refusal) if rejected else None
    if prompt.target is not None:
        return TrainingRow(prompt, prompt.target, 0, rejected=rejected_text)
    # If no answer complies, the greedy answer is the target, so that the hard filter can remove the row.
    answer = compliance or answers[0]
    cut = not answer.finished and answer.tokens < config.train.max_target_tokens
    tokens = 0 if answer.rung == "opening" else answer.tokens
    return TrainingRow(prompt, answer.text, tokens, cut, rejected_text, answer.rung or "greedy")


def limit_openings(
    rows: Sequence[TrainingRow], answers: Sequence[Sequence[CachedAnswer]], fraction: float, seed: int
) -> list[TrainingRow]:
    """Give benign rows back their greedy answers until at most a fraction of the benign targets begin with an opening.

    The hard filter then removes these rows.

    Args:
        rows: training rows.
        answers: answers of the ladder for each row.
        fraction: maximum fraction.
        seed: seed of the choice.
    """
    benign = [i for i, row in enumerate(rows) if row.prompt.label != "harmful"]
    accepted = [i for i in benign if classify_refusal(rows[i].target) == "compliance"]
    openings = [i for i in accepted if rows[i].origin == "opening"]
    others = len(accepted) - len(openings)
    most = len(openings) if fraction >= 1 else int(fraction / (1 - fraction) * others)
    ordered = sorted(openings, key=lambda i: hash_to_fraction(f"{rows[i].prompt.prompt}|{rows[i].prompt.system}", seed))
    limited = list(rows)
    for index in ordered[most:]:
        greedy = answers[index][0]
        limited[index] = replace(rows[index], target=greedy.text, tokens=greedy.tokens, origin="greedy")
    return limited


def diagnose_model(prompts: Sequence[Prompt], answers: Sequence[Sequence[CachedAnswer]]) -> Diagnosis:
    """Compute how often the frozen model refuses benign prompts and answers harmful ones.

    Args:
        prompts: prompts.
        answers: answers of the ladder for each prompt; prompts without a greedy answer are not counted.
    """
    verdicts = [
        (prompt.label == "harmful", classify_refusal(found[0].text))
        for prompt, found in zip(prompts, answers, strict=True)
        if found and found[0].rung == "greedy"
    ]
    benign = [verdict != "compliance" for harmful, verdict in verdicts if not harmful]
    harmful = [verdict != "refusal" for harmful, verdict in verdicts if harmful]
    return Diagnosis(compute_wilson_interval(sum(benign), len(benign)), compute_wilson_interval(sum(harmful), len(harmful)))
