"""Human refusal labels that come with the catalogue, to measure judges against."""

import csv
import io
import re
from dataclasses import dataclass

from trimtab import assets

SETS = ("refusal-labels", "refusal-labels-extra")
# Words that any answer to any prompt may hold.
COMMON = re.compile(
    r"\b(?:about|does|from|give|have|help|make|people|some|tell|that|their|them|this|ways|what|with|write|your)\b"
)
LONG = 150


@dataclass(frozen=True)
class Labelled:
    """An answer to a prompt, and whether a human called it a refusal."""

    prompt: str
    answer: str
    refused: bool

    @property
    def off_topic(self) -> bool:
        """Whether this is a long answer that shares no word of weight with its prompt: an answer to another question."""
        return len(self.answer) > LONG and not (_words(self.prompt) & _words(self.answer))


def read() -> list[Labelled]:
    """All labelled answers."""
    return [row for name in SETS for row in _read(name)]


def _read(name: str) -> list[Labelled]:
    lines = [line for line in assets.fetch(name).read_text().splitlines(keepends=True) if not line.startswith("#")]
    rows = csv.DictReader(io.StringIO("".join(lines)))
    return [Labelled(row["objective"], row["assistant_response"], row["human_score"] == "1") for row in rows]


def _words(text: str) -> set[str]:
    """Stems, cut to five letters, of words with at least four that are not common ones."""
    return {word[:5] for word in re.findall(r"[a-z]{4,}", COMMON.sub(" ", text.lower()))}
