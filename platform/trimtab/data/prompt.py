"""What a prompt is, and how sets of them are named by digest and split."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from trimtab.errors import UsageError
from trimtab.types import Label, Part


@dataclass(frozen=True)
class Prompt:
    """One prompt with its class. `group` keeps what belongs together (twins, rewrites) on one side of a split;
    `target` is the wanted answer where the source brings one; `system` a system message of its own; `history` the turns
    (role, content) of a conversation before this prompt."""

    prompt: str
    label: Label
    source: str
    group: str
    target: str | None = None
    system: str | None = None
    history: tuple[tuple[str, str], ...] = ()

    @property
    def messages(self) -> list[dict[str, str]]:
        """The prompt as chat messages."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        turns = [{"role": role, "content": content} for role, content in self.history]
        return [*system, *turns, {"role": "user", "content": self.prompt}]


def compute_prompts_digest(prompts: Sequence[Prompt]) -> str:
    """16 hex digits that name exactly these prompts in this order."""
    lines = "\n".join(json.dumps(asdict(p), sort_keys=True) for p in prompts)
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


def hash_to_fraction(text: str, seed: int) -> float:
    """A number in [0, 1) that depends on the text and the seed only: choices that stay when data is added."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{text}".encode()).digest()[:8]) / 2**64


def split_prompts(prompts: Sequence[Prompt], validation: float, test: float, seed: int) -> dict[Part, list[Prompt]]:
    """Part prompts by group into train, validation and test; the shares are of groups, about.

    Raises UsageError where a part that was asked for, or the training part, comes out empty.
    """
    parts: dict[Part, list[Prompt]] = {"train": [], "validation": [], "test": []}
    for prompt in prompts:
        at = hash_to_fraction(prompt.group, seed)
        part: Part = "test" if at < test else "validation" if at < test + validation else "train"
        parts[part].append(prompt)
    shares: dict[Part, float] = {"train": 1.0, "validation": validation, "test": test}
    for part, share in shares.items():
        labels = {p.label == "harmful" for p in parts[part]}
        if share > 0 and labels != {True, False}:
            raise UsageError(
                f"the {part} part has no {'harmful' if True not in labels else 'benign'} prompts: give more data "
                f"({len(prompts)} prompts in all) or other shares"
            )
    return parts


def write_prompts(prompts: Sequence[Prompt], path: Path) -> None:
    """Write prompts as JSONL with the fields that the readers take."""
    with path.open("w") as file:
        for p in prompts:
            row = {"prompt": p.prompt, "class": p.label, "source": p.source, "group": p.group}
            extra = {"target": p.target, "system": p.system, "messages": p.messages if p.history else None}
            file.write(json.dumps(row | {k: v for k, v in extra.items() if v}) + "\n")
