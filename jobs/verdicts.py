"""Verdicts that are kept, so that no answer is judged twice by the same judge: those of an endpoint cost money."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from trimtab import settings
from trimtab.jobs import lines
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
        for row in lines.read(self._file):
            verdict: Verdict | None = next((v for v in VERDICTS if v == row["verdict"]), None)
            if verdict and row["key"] in wanted:
                found[wanted[row["key"]]] = verdict
        return found

    def keep(self, pairs: Sequence[Pair], verdicts: Sequence[Verdict]) -> None:
        """Add verdicts."""
        lines.append(
            self._file,
            ({"key": _digest(pair), "verdict": verdict} for pair, verdict in zip(pairs, verdicts, strict=True)),
        )

    @property
    def _file(self) -> Path:
        return settings.home() / "verdicts" / f"{hashlib.sha256(self.judge.encode()).hexdigest()[:20]}.jsonl"


def _digest(pair: Pair) -> str:
    return hashlib.sha256(json.dumps(pair).encode()).hexdigest()[:24]
