"""Answers of a frozen model that are kept, by base model and by all that they depend on, so that none is drawn twice."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from trimtab import settings
from trimtab.generation_types import Sampling
from trimtab.jobs import lines
from trimtab.model.base_model import BaseModel
from trimtab.model.chat_template import Message
from trimtab.types import Precision


@dataclass(frozen=True)
class Request:
    """A conversation to answer, and how; or to read, where its answer is `given`."""

    messages: Sequence[Message]
    sampling: Sampling
    given: str | None = None

    def key(self, precision: Precision) -> str:
        """24 hex digits that name the request, for answers of one base model computed in one precision."""
        what = json.dumps([list(self.messages), asdict(self.sampling), precision, self.given])
        return hashlib.sha256(what.encode()).hexdigest()[:24]


@dataclass(frozen=True)
class Drawn:
    """One answer: its text and length in tokens, whether the model ended it, and the mean log-probability of its tokens."""

    text: str
    tokens: int
    whole: bool
    likelihood: float


def read(base: BaseModel, keys: set[str]) -> dict[str, list[Drawn]]:
    """Answers that are kept for these keys."""
    found = (row for row in lines.read(_file(base)) if row["key"] in keys)
    return {row["key"]: [Drawn(**answer) for answer in row["answers"]] for row in found}


def append(base: BaseModel, answers: Mapping[str, Sequence[Drawn]]) -> None:
    """Keep answers by their keys."""
    lines.append(_file(base), ({"key": key, "answers": [asdict(d) for d in drawn]} for key, drawn in answers.items()))


def _file(base: BaseModel) -> Path:
    return settings.home() / "answers" / f"{base.fingerprint}.jsonl"
