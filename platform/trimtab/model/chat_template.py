"""The one chat renderer: messages to token ids with a prefix at its place, for training, evaluation and serving alike.

A prefix is a few *row tokens*: special tokens after the end of the vocabulary, one for each learned row. They are put
into the messages as text, which the tokenizer can neither split nor merge, so that the model's own chat template, tools
and all, renders around them.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError
from transformers import AddedToken, PreTrainedTokenizerBase

from trimtab.errors import UsageError
from trimtab.model.base_model import BaseModel
from trimtab.types import Position

Message = Mapping[str, Any]
"""An OpenAI chat message: `role`, and `content` as text or a list of parts."""

SYSTEM_ROLES = ("system", "developer")
PROBE = "\u2402trimtab\u2402"
THINK = "<think>"


@dataclass(frozen=True)
class ChatRenderer:
    """A tokenizer with row tokens. `first_row` is the id of the first of `rows` row tokens, which are consecutive.

    `turn_end` is the token that ends an answer. `takes_system` is whether the template shows a system message;
    `default_system` is what it shows without one.
    """

    tokenizer: PreTrainedTokenizerBase
    first_row: int
    rows: int
    turn_end: int
    takes_system: bool
    default_system: str | None

    def render_prompt(self, messages: Sequence[Message], place: Position = "system", rows: Sequence[int] = ()) -> list[int]:
        """Token ids of a conversation that the assistant is to answer, with `rows` (ids of row tokens) at `place`.

        Raises UsageError where the template does not take the messages.
        """
        marked = (
            self.insert_row_tokens(messages, place, rows) if rows and place != "start" else self.fold_system_message(messages)
        )
        try:
            # mark() leaves plain messages; the template of the checkpoint does the rest.
            ids: list[int] = self.tokenizer.apply_chat_template(  # pyright: ignore[reportAssignmentType]
                [dict(m) for m in marked], add_generation_prompt=True, tokenize=True, return_dict=False
            )
        except TemplateError as error:
            raise UsageError(f"the chat template does not take these messages: {str(error).partition(chr(10))[0]}") from error
        return self.insert_rows_at_start(list(ids), rows) if place == "start" else list(ids)

    def render_answer(self, text: str, before: Sequence[int] = ()) -> list[int]:
        """Token ids of an answer as the model would write it, its end-of-turn token last.

        Where the prompt `before` it has opened a thinking block, the answer begins inside: it is not opened again.
        """
        text = text.strip()
        if text.startswith(THINK) and str(self.tokenizer.decode(list(before[-8:]))).rstrip().endswith(THINK):
            text = text.removeprefix(THINK).lstrip()
        return [*self.tokenizer.encode(text, add_special_tokens=False), self.turn_end]

    def render_conversation(
        self, messages: Sequence[Message], place: Position = "system", rows: Sequence[int] = ()
    ) -> tuple[list[int], list[range]]:
        """Token ids of a conversation up to its last answer, and the span of each of the assistant's answers in them.

        An earlier answer that the template shows otherwise than it was said (without its thoughts, say) has no span.
        """
        said = [i for i, m in enumerate(messages) if m.get("role") == "assistant" and isinstance(m.get("content"), str)]
        prompts = [self.render_prompt(messages[:i], place, rows) for i in said]
        upto = [(before, self.render_answer(messages[i]["content"], before)) for i, before in zip(said, prompts, strict=True)]
        if not upto:
            return [], []
        ids = [*upto[-1][0], *upto[-1][1]]
        spans = [
            range(len(before), len(before) + len(answer))
            for before, answer in upto
            if ids[: len(before) + len(answer)] == [*before, *answer]
        ]
        return ids, spans

    def check_rows(self, ids: Sequence[int], rows: Sequence[int]) -> None:
        """UsageError unless the row tokens of a prompt are exactly those of its prefix."""
        if [i for i in ids if i >= self.first_row] != list(rows):
            raise UsageError("a message holds the text of a row token; only a prefix may put one there")

    def row_text(self, rows: Sequence[int]) -> str:
        """The text that tokenizes to exactly these row tokens."""
        return "".join(format_row_token(row - self.first_row) for row in rows)

    def fold_system_message(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """A copy of the messages; where the template shows no system message, it stands before the first user message."""
        copied = [deepcopy(dict(m)) for m in messages]
        first_user = next((m for m in copied if m.get("role") == "user"), None)
        if self.takes_system or first_user is None or copied[0].get("role") not in SYSTEM_ROLES:
            return copied
        content = copied[0].get("content") or ""
        parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
        text = "\n".join(part["text"] for part in parts if part.get("type") == "text")
        first_user["content"] = _prepend(first_user.get("content"), f"{text}\n\n")
        return copied[1:]

    def insert_row_tokens(self, messages: Sequence[Message], place: Position, rows: Sequence[int]) -> list[dict[str, Any]]:
        """Put row tokens into the messages at `system`, `system-end` or `user`; the input is not changed.

        With `system` and `system-end` a conversation without a system message gets one: of the rows alone, or of the
        template's own default text and the rows. Raises UsageError where the template shows no system message.
        """
        text = self.row_text(rows)
        marked = self.fold_system_message(messages)
        if place == "user":
            first_user = next((m for m in marked if m.get("role") == "user"), None)
            if first_user is None:
                raise UsageError("this prefix goes into the first user message, and there is none")
            first_user["content"] = _prepend(first_user.get("content"), text)
            return marked
        if not self.takes_system:
            raise UsageError("this chat template takes no system message; use place user or start")
        if not marked or marked[0].get("role") not in SYSTEM_ROLES:
            own = (self.default_system or "") if place == "system-end" else ""
            return [{"role": "system", "content": own + text}, *marked]
        insert = _append if place == "system-end" else _prepend
        marked[0]["content"] = insert(marked[0].get("content"), text)
        return marked

    def insert_rows_at_start(self, ids: Sequence[int], rows: Sequence[int]) -> list[int]:
        """Put row tokens first, right after the beginning-of-sequence token where there is one."""
        # In some chat templates the "bos" token also opens each turn; only one that comes once is a beginning.
        bos = self.tokenizer.bos_token_id
        head = 1 if ids and ids[0] == bos and bos not in ids[1:] else 0
        return [*ids[:head], *rows, *ids[head:]]


def build_renderer(base: BaseModel, rows: int) -> ChatRenderer:
    """The renderer of a base model with `rows` row tokens."""
    return _renderer(base, rows)


def format_row_token(index: int) -> str:
    """Text of the row token `index` (from 0)."""
    return f"<|trimtab_row_{index}|>"


@lru_cache(maxsize=8)
def _renderer(base: BaseModel, rows: int) -> ChatRenderer:
    tokenizer = base.tokenizer()
    if not tokenizer.chat_template:
        raise UsageError(f"base model {base.name} has no chat template; trimtab steers chat models")
    turn_end, takes_system, default_system = _turn_end(tokenizer), *_system(tokenizer)
    first = max(max(tokenizer.get_vocab().values()) + 1, len(tokenizer))
    tokens = [AddedToken(format_row_token(i), special=True, normalized=False) for i in range(rows)]
    tokenizer.add_tokens(tokens, special_tokens=True)
    ids = tokenizer.convert_tokens_to_ids([format_row_token(i) for i in range(rows)])
    if ids != list(range(first, first + rows)):
        raise UsageError(f"the tokenizer of {base.name} does not take new tokens at the end of its vocabulary")
    return ChatRenderer(tokenizer, first, rows, turn_end, takes_system, default_system)


def _turn_end(tokenizer: PreTrainedTokenizerBase) -> int:
    """The first special token that the template writes after an answer: not all models end a turn as they end a sequence."""
    said = [{"role": "user", "content": "x"}, {"role": "assistant", "content": PROBE}]
    after = str(tokenizer.apply_chat_template(said, tokenize=False)).rpartition(PROBE)[2]
    added = tokenizer.added_tokens_decoder
    ends = (i for i in tokenizer.encode(after, add_special_tokens=False) if i in added and added[i].special)
    return next(ends, tokenizer.eos_token_id)  # pyright: ignore[reportReturnType]


def _system(tokenizer: PreTrainedTokenizerBase) -> tuple[bool, str | None]:
    """Whether the template shows a system message, and the text it writes by itself: found by rendering with and without."""
    user = {"role": "user", "content": "x"}
    try:
        given = str(tokenizer.apply_chat_template([{"role": "system", "content": PROBE}, user], tokenize=False))
    except Exception:  # templates raise their own errors, of any type
        return False, None
    before, found, after = given.partition(PROBE)
    default = str(tokenizer.apply_chat_template([user], tokenize=False))
    if not found or not default.startswith(before) or not default.endswith(after):
        return bool(found), None
    return True, default[len(before) : len(default) - len(after)] or None


def _prepend(content: Any, text: str) -> Any:
    return _insert(content, text, at_end=False)


def _append(content: Any, text: str) -> Any:
    return _insert(content, text, at_end=True)


def _insert(content: Any, text: str, *, at_end: bool) -> Any:
    """Insert into plain text, or into the first or last part of a list of parts."""
    if content is None or isinstance(content, str):
        return (content or "") + text if at_end else text + (content or "")
    if not isinstance(content, list):
        raise UsageError("a message's content must be text or a list of parts")
    index = -1 if at_end else 0
    if content and isinstance(content[index], dict) and content[index].get("type") == "text":
        part = content[index]
        part["text"] = _insert(part.get("text"), text, at_end=at_end)
        return content
    new = {"type": "text", "text": text}
    return [*content, new] if at_end else [new, *content]
