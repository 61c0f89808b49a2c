"""Prompt type, and the digest, split and file format of prompt lists."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from trimtab.errors import UsageError
from trimtab.types import Label, Part
from trimtab.util.identifiers import compute_key


@dataclass(frozen=True)
class Prompt:
    """A prompt with its class.

    Attributes:
        prompt: text of the user's message.
        label: class of the prompt.
        source: name of the data source.
        group: key of related prompts (contrast pairs, rewrites), which a split keeps together.
        target: desired answer, if the source provides one.
        system: system message of this prompt, if any.
        history: earlier turns (role, content) of the conversation.
        labels: properties of the prompt, for a detector with several labels.
    """

    prompt: str
    label: Label
    source: str
    group: str
    target: str | None = None
    system: str | None = None
    history: tuple[tuple[str, str], ...] = ()
    labels: tuple[str, ...] = ()

    @property
    def messages(self) -> list[dict[str, str]]:
        """The prompt as chat messages."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        turns = [{"role": role, "content": content} for role, content in self.history]
        return [*system, *turns, {"role": "user", "content": self.prompt}]


def add_system_prompt(prompt: Prompt, system: str) -> Prompt:
    """Return a prompt with a system prompt, before its own one if there is one."""
    return replace(prompt, system=f"{system}\n\n{prompt.system}" if prompt.system else system)


def compute_prompt_key(prompt: Prompt) -> str:
    """Return the key of a prompt: a hash of the conversation and its side, harmful or benign, 24 hex digits."""
    return compute_key(json.dumps([prompt.messages, prompt.label != "harmful"]), 24)


def compute_prompts_digest(prompts: Sequence[Prompt]) -> str:
    """Return the first 16 hex digits of the SHA-256 of the prompts, which depends on all fields and on the order."""
    # Prompts without labels have the digest that they had before there were labels.
    rows = [{name: value for name, value in asdict(p).items() if name != "labels" or value} for p in prompts]
    lines = "\n".join(json.dumps(row, sort_keys=True) for row in rows)
    return compute_key(lines, 16)


def hash_to_fraction(text: str, seed: int) -> float:
    """Map a text and a seed to a number in [0, 1), so that random choices are stable when data is added."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{text}".encode()).digest()[:8]) / 2**64


def split_prompts(prompts: Sequence[Prompt], validation: float, test: float, seed: int) -> dict[Part, list[Prompt]]:
    """Split prompts by group into train, validation and test.

    Args:
        prompts: prompts of all classes.
        validation: approximate fraction of groups in the validation part.
        test: approximate fraction of groups in the test part.
        seed: seed of the assignment of groups.

    Returns:
        The prompts of each part, in their order.

    Raises:
        UsageError: if the training part, or another part with a fraction above 0, has no harmful or no benign prompts.
    """
    parts: dict[Part, list[Prompt]] = {"train": [], "validation": [], "test": []}
    for prompt in prompts:
        position = hash_to_fraction(prompt.group, seed)
        part: Part = "test" if position < test else "validation" if position < test + validation else "train"
        parts[part].append(prompt)
    shares: dict[Part, float] = {"train": 1.0, "validation": validation, "test": test}
    for part, share in shares.items():
        labels = {p.label == "harmful" for p in parts[part]}
        if share > 0 and labels != {True, False}:
            raise UsageError(
                f"the {part} part has no {'harmful' if True not in labels else 'benign'} prompts ({len(prompts)} prompts in "
                "all parts): give more data or change the fractions of the parts"
            )
    return parts


def write_prompts(prompts: Sequence[Prompt], path: Path) -> None:
    """Write prompts as JSONL that `read_prompts` can read."""
    with path.open("w") as file:
        for p in prompts:
            row = {"prompt": p.prompt, "class": p.label, "source": p.source, "group": p.group}
            extra = {"target": p.target, "system": p.system, "messages": p.messages if p.history else None}
            extra |= {"labels": list(p.labels)}
            file.write(json.dumps(row | {k: v for k, v in extra.items() if v}) + "\n")
