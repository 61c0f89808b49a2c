"""Plain technical English in code, comments, docstrings, errors and help texts of the package."""

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tests.support import ROOT

# Words of an earlier style that stand for a technical noun.
PARTICIPLES = ("asked", "said", "told", "kept")
WORDS = (*PARTICIPLES, "whoever", "nobody", "so many", "of ours", "as good as none")
# Words that may stand in a text, but not in a name.
NAME_WORDS = {*PARTICIPLES, "given", "known", "seen"}
# Allowed uses by file and word. The test compares exact counts, so that a removed use does not allow a new one.
ALLOWED = {
    # The ordinary verb.
    ("jobs/gc/config.py", "kept"): 1,
    ("platform/trimtab/engine/vllm_ext/capture.py", "kept"): 1,
    ("platform/trimtab/engine/vllm_ext/capture_worker.py", "kept"): 1,
    ("platform/trimtab/errors.py", "kept"): 2,
    ("platform/trimtab/heads/__init__.py", "kept"): 1,
    ("platform/trimtab/heads/flag.py", "kept"): 1,
    ("platform/trimtab/heads/haloscope.py", "kept"): 1,
    ("platform/trimtab/heads/linear.py", "kept"): 1,
    ("platform/trimtab/text/normalization.py", "kept"): 2,
    ("platform/trimtab/util/patching.py", "kept"): 1,
    ("serve/record_sinks.py", "kept"): 1,
    # Prompts of judges, which are part of the keys of cached verdicts.
    ("platform/trimtab/judges/llm_answer.py", "asked"): 1,
    ("platform/trimtab/judges/llm_answer.py", "said"): 1,
    ("platform/trimtab/judges/llm_answer.py", "whoever"): 1,
    ("platform/trimtab/judges/llm_refusal.py", "asked"): 4,
    ("platform/trimtab/judges/llm_refusal.py", "said"): 1,
    ("platform/trimtab/judges/llm_refusal.py", "whoever"): 1,
    # A pattern that matches words of answers.
    ("platform/trimtab/text/refusal_phrases.py", "said"): 1,
    # Names in files and tags that 0.1.0 wrote: signal data sets, cards of refusal heads, gate decisions.
    ("platform/trimtab/detection/signal_files.py", "asked"): 1,
    ("platform/trimtab/judges/refusal_head.py", "said"): 2,
    ("platform/trimtab/tracking/promotions.py", "said"): 2,
}


def count_words() -> Counter[tuple[str, str]]:
    """Count the uses of each word by file and word. Parts of an identifier count as words."""
    counts: Counter[tuple[str, str]] = Counter()
    for folder in ("platform", "jobs", "serve"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text().lower()
            for word in WORDS:
                if uses := len(re.findall(rf"(?<![a-z]){word}(?![a-z])", text)):
                    counts[path.relative_to(ROOT).as_posix(), word] = uses
    return counts


def test_uses_no_other_dialect_words():
    assert dict(count_words()) == ALLOWED


def list_names(path: Path) -> Iterator[str]:
    """Yield the names that a module defines: functions, classes, arguments, variables and attributes."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr


def test_names_contain_no_participle_in_the_place_of_a_noun():
    paths = [path for folder in ("platform", "jobs", "serve", "bench") for path in (ROOT / folder).rglob("*.py")]
    names = [(path.name, name) for path in paths for name in list_names(path)]
    assert [key for key in names if NAME_WORDS & set(re.sub(r"(?<=[a-z])(?=[A-Z])", "_", key[1]).lower().split("_"))] == []
