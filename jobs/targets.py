"""The kept targets of benign prompts: what the base model itself answered, by base model, prompt and length.

One vector cannot teach a new style, so what is to be said must be what the model would say (METHODS: low perplexity).
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock

from trimtab import settings
from trimtab.answers import Answer
from trimtab.base import BaseModel
from trimtab.data.rows import Prompt


def cached(base: BaseModel, prompts: Sequence[Prompt], max_tokens: int) -> dict[str, Answer]:
    """Answers that are already kept for this base model, by `key`."""
    path = _file(base)
    if not path.exists():
        return {}
    wanted = {key(p, max_tokens) for p in prompts}
    found: dict[str, Answer] = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        if row["key"] in wanted:
            found[row["key"]] = Answer(row["text"], tuple(row["token_ids"]), row["finished"], row["prompt_tokens"])
    return found


def keep(base: BaseModel, prompts: Sequence[Prompt], answers: Sequence[Answer], max_tokens: int) -> None:
    """Keep one answer for each prompt."""
    lines = [
        json.dumps(
            {
                "key": key(prompt, max_tokens),
                "text": answer.text,
                "token_ids": answer.token_ids,
                "finished": answer.finished,
                "prompt_tokens": answer.prompt_tokens,
            }
        )
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    path = _file(base)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"), path.open("a") as file:
        file.write("\n".join(lines) + "\n")


def key(prompt: Prompt, max_tokens: int) -> str:
    """What an answer depends on besides the base model."""
    return hashlib.sha256(json.dumps([prompt.messages, max_tokens]).encode()).hexdigest()[:24]


def _file(base: BaseModel) -> Path:
    return settings.home() / "targets" / f"{base.fingerprint}.jsonl"
