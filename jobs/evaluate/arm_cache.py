"""Cache of the answers and text scores of arms.

Verdicts and marks are not cached, so that another judge or reference answer applies to cached answers.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trimtab.data.prompt import Prompt, compute_prompts_digest
from trimtab.evaluation.safety.results import Arm
from trimtab.evaluation.utility.text_scoring import TextScore
from trimtab.types import DType
from trimtab.util.atomic_files import write_atomic
from trimtab.util.identifiers import compute_key


@dataclass(frozen=True)
class ArmCache:
    """Cache of the answers or text scores of arms on one list of prompts, with one file per arm.

    Attributes:
        folder: folder of the files.
        fingerprint: base model fingerprint.
        prompts: prompts.
        limit: maximum length of each answer or text, in tokens.
        dtype: data type of the model.
    """

    folder: Path
    fingerprint: str
    prompts: Sequence[Prompt]
    limit: int
    dtype: DType

    def has_answers(self, arm: Arm) -> bool:
        """Return whether the answers of an arm are cached."""
        return self._file("answers", arm).exists()

    def read_answers(self, arm: Arm) -> list[str] | None:
        """Return the cached answers of an arm; None if there are none."""
        return self._get("answers", arm)

    def read_readings(self, arm: Arm) -> list[TextScore] | None:
        """Return the cached text scores of an arm; None if there are none."""
        readings = self._get("readings", arm)
        return None if readings is None else [TextScore(**reading) for reading in readings]

    def write_answers(self, arm: Arm, answers: Sequence[str]) -> None:
        """Write the answers of an arm."""
        self._put("answers", arm, list(answers))

    def write_readings(self, arm: Arm, readings: Sequence[TextScore]) -> None:
        """Write the text scores of an arm."""
        self._put("readings", arm, [asdict(reading) for reading in readings])

    def _get(self, kind: str, arm: Arm) -> Any:
        path = self._file(kind, arm)
        return json.loads(path.read_text())[kind] if path.exists() else None

    def _put(self, kind: str, arm: Arm, values: list[Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self._file(kind, arm), json.dumps({"arm": arm.name, kind: values}))

    def _file(self, kind: str, arm: Arm) -> Path:
        prefix = [arm.prefix.card.digest, arm.prefix.card.position] if arm.prefix else []
        key = json.dumps(
            [
                kind,
                self.fingerprint,
                compute_prompts_digest(self.prompts),
                self.limit,
                self.dtype,
                arm.system,
                *prefix,
            ]
        )
        return self.folder / f"{compute_key(key, 20)}.json"
