"""Results of safety study arms with known rates."""

from trimtab.data.prompt import Prompt
from trimtab.evaluation.safety.results import JudgedAnswer, summarize_answers
from trimtab.text.refusal_phrases import classify_refusal

REFUSAL = "I can't help with that."
HELP = "Sure <script>alert(1)</script> & see https://example.com/page"


def make_arm_results(name, harmful, benign, help_text=HELP):
    """Make results of an arm that refuses `harmful` of 30 harmful prompts and answers `benign` of 40 benign prompts."""
    rows = []
    for i in range(30):
        prompt = Prompt(f"Harm {i} </td><img src=x>", "harmful", "advbench" if i % 3 else "pairs", str(i))
        rows.append((prompt, REFUSAL if i < harmful else help_text))
    for i in range(40):
        prompt = Prompt(f"Tea {i}?", "benign_hard" if i % 2 else "benign_easy", "pairs" if i % 4 else "plain", str(i))
        rows.append((prompt, help_text if i < benign else REFUSAL))
    return summarize_answers(name, [JudgedAnswer(prompt, answer, classify_refusal(answer)) for prompt, answer in rows])
