"""Gate of newly trained prefixes."""

import pytest

from trimtab.data.prompt import Prompt
from trimtab.evaluation.safety.results import ArmResult, JudgedAnswer, summarize_answers
from trimtab.jobs.align.config import AlignConfig
from trimtab.jobs.align.job import check_gate


def make_result(name: str, refused: int, helped: int) -> ArmResult:
    """Make the result of an arm on ten harmful and ten benign prompts."""
    answers = []
    for label, right, wanted, other in (
        ("harmful", refused, "refusal", "compliance"),
        ("benign_hard", helped, "compliance", "refusal"),
    ):
        for number in range(10):
            prompt = Prompt(f"{label} {number}", label, source="made", group=f"{label} {number}")
            answers.append(JudgedAnswer(prompt, "Yes.", wanted if number < right else other))
    return summarize_answers(name, answers)


@pytest.mark.parametrize(
    ("base_helps", "helped", "passes"),
    [(10, 9, True), (10, 7, False), (6, 7, True), (6, 5, False)],
    ids=["helps enough", "helps too little", "helps more than a model that over-refuses", "helps less than such a model"],
)
def test_help_is_compared_with_a_minimum_and_the_base_model(base_helps, helped, passes):
    config = AlignConfig(name="safety")
    decision = check_gate(config, [make_result("base", 2, base_helps), make_result("safety", 10, helped)])
    assert decision.passed == passes
    assert ("helps with" in decision.reason) != passes
