"""Answers and readings of arms that are kept, so that nothing is asked or read twice.

Verdicts and marks are not kept here: a better judge, or one more alias, marks anew.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trimtab.data.prompt import Prompt, compute_prompts_digest
from trimtab.evaluation.safety.results import Arm
from trimtab.evaluation.utility.text_scoring import TextScore
from trimtab.types import Precision
from trimtab.util.atomic_files import write_atomic


@dataclass(frozen=True)
class ArmCache:
    """What arms on the base model of this `fingerprint` answered, or read, of one list of prompts: one file an arm. `limit` is
    in tokens of each answer or text."""

    folder: Path
    fingerprint: str
    prompts: Sequence[Prompt]
    limit: int
    precision: Precision

    def has_answers(self, arm: Arm) -> bool:
        """Whether an arm was asked."""
        return self._file("answers", arm).exists()

    def read_answers(self, arm: Arm) -> list[str] | None:
        """An arm's answers, None where it was not asked yet."""
        return self._get("answers", arm)

    def read_readings(self, arm: Arm) -> list[TextScore] | None:
        """An arm's readings, None where it has not read yet."""
        found = self._get("readings", arm)
        return None if found is None else [TextScore(**reading) for reading in found]

    def write_answers(self, arm: Arm, answers: Sequence[str]) -> None:
        """Keep an arm's answers."""
        self._put("answers", arm, list(answers))

    def write_readings(self, arm: Arm, readings: Sequence[TextScore]) -> None:
        """Keep an arm's readings."""
        self._put("readings", arm, [asdict(reading) for reading in readings])

    def _get(self, what: str, arm: Arm) -> Any:
        path = self._file(what, arm)
        return json.loads(path.read_text())[what] if path.exists() else None

    def _put(self, what: str, arm: Arm, values: list[Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self._file(what, arm), json.dumps({"arm": arm.name, what: values}))

    def _file(self, what: str, arm: Arm) -> Path:
        steered = [arm.prefix.card.digest, arm.prefix.card.place] if arm.prefix else []
        named = json.dumps(
            [
                what,
                self.fingerprint,
                compute_prompts_digest(self.prompts),
                self.limit,
                self.precision,
                arm.system,
                *steered,
            ]
        )
        return self.folder / f"{hashlib.sha256(named.encode()).hexdigest()[:20]}.json"
