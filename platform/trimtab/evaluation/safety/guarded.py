"""Arms that act on the verdict of a detector of prompts. Their answers are composed of those of other arms."""

from collections.abc import Sequence

from trimtab.evaluation.safety.results import ArmResult, JudgedAnswer, summarize_answers
from trimtab.types import CONDITIONAL_ARM, FIXED_REFUSAL, GUARD_ARM


def build_guarded_results(base: ArmResult, prefixes: Sequence[ArmResult], flagged: Sequence[bool]) -> list[ArmResult]:
    """Return the results of the arms that act on the verdicts.

    Arm `guard` answers flagged prompts with a fixed refusal, and leaves the others to the base model. Arm `conditional` steers
    flagged prompts with a prefix, and leaves the others to the base model. Arm `conditional help` refuses flagged prompts, and
    steers the others with the prefix. With several prefixes, the names of the conditional arms end with theirs.

    Args:
        base: result of the base model.
        prefixes: result of each prefix.
        flagged: whether the detector flags each prompt, in the order of the answers.
    """
    guarded = [refuse_prompt(answer) if flag else answer for answer, flag in zip(base.answers, flagged, strict=True)]
    results = [summarize_answers(GUARD_ARM, guarded)]
    for prefix in prefixes:
        # Seeds of one arm have names such as sta#0.
        ending = f" {prefix.name}" if len(prefixes) > 1 or "#" in prefix.name else ""
        triples = list(zip(base.answers, prefix.answers, flagged, strict=True))
        steered = [answer if flag else plain for plain, answer, flag in triples]
        helped = [refuse_prompt(answer) if flag else answer for _, answer, flag in triples]
        results.append(summarize_answers(f"{CONDITIONAL_ARM}{ending}", steered))
        results.append(summarize_answers(f"{CONDITIONAL_ARM} help{ending}", helped))
    return results


def refuse_prompt(answer: JudgedAnswer) -> JudgedAnswer:
    """Return the fixed refusal instead of an answer."""
    return JudgedAnswer(answer.prompt, FIXED_REFUSAL, "refusal")
