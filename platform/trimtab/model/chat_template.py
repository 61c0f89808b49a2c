"""Chat renderer: messages to token ids with a prefix, shared by training, evaluation and serving.

A prefix is represented by *slot tokens*: special tokens after the end of the vocabulary, one for each slot. They are inserted
into the messages as text, which the tokenizer can neither split nor merge. The model's own chat template, including its tool
format, is therefore applied unchanged.
"""

from collections.abc import Mapping, Sequence
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
    """Chat renderer: a tokenizer with slot tokens.

    Attributes:
        tokenizer: tokenizer of the base model with the slot tokens added.
        first_slot: id of the first slot token; the ids are consecutive.
        num_slots: number of slot tokens.
        turn_end: id of the token that ends an answer.
        takes_system: whether the template renders a system message.
        default_system: system message that the template adds by itself, or None.
        answer_start: ids that the template writes before an answer; empty if it does not mark the start of an answer.
    """

    tokenizer: PreTrainedTokenizerBase
    first_slot: int
    num_slots: int
    turn_end: int
    takes_system: bool
    default_system: str | None
    answer_start: tuple[int, ...] = ()

    def render_prompt(self, messages: Sequence[Message], position: Position = "system", slots: Sequence[int] = ()) -> list[int]:
        """Render a conversation that the assistant answers next.

        Args:
            messages: messages of the conversation.
            position: position of the prefix.
            slots: ids of the slot tokens to insert.

        Returns:
            Token ids, including the generation prompt.

        Raises:
            UsageError: if the template rejects the messages.
        """
        marked = (
            self.insert_slot_tokens(messages, position, slots)
            if slots and position != "start"
            else self.fold_system_message(messages)
        )
        try:
            # The messages are plain text at this point, and the checkpoint's own template renders them.
            ids: list[int] = self.tokenizer.apply_chat_template(  # pyright: ignore[reportAssignmentType]
                [dict(m) for m in marked], add_generation_prompt=True, tokenize=True, return_dict=False
            )
        except TemplateError as error:
            raise UsageError(f"the chat template does not take these messages: {str(error).partition(chr(10))[0]}") from error
        return self.insert_slots_at_start(list(ids), slots) if position == "start" else list(ids)

    def render_answer(self, text: str, before: Sequence[int] = ()) -> list[int]:
        """Render an answer as the model would generate it, with its end-of-turn token.

        If the prompt ends with an opening thinking tag, the tag is not repeated at the start of the answer.

        Args:
            text: text of the answer.
            before: token ids of the prompt.

        Returns:
            Token ids of the answer.
        """
        text = text.strip()
        if text.startswith(THINK) and str(self.tokenizer.decode(list(before[-8:]))).rstrip().endswith(THINK):
            text = text.removeprefix(THINK).lstrip()
        return [*self.tokenizer.encode(text, add_special_tokens=False), self.turn_end]

    def render_conversation(
        self, messages: Sequence[Message], position: Position = "system", slots: Sequence[int] = ()
    ) -> tuple[list[int], list[range]]:
        """Render a conversation up to its last assistant answer.

        An earlier answer that the template renders differently, for example without its thoughts, has no span.

        Args:
            messages: messages of the conversation.
            position: position of the prefix.
            slots: ids of the slot tokens to insert.

        Returns:
            Token ids, and the span of each assistant answer in them.
        """
        indices = [i for i, m in enumerate(messages) if m.get("role") == "assistant" and isinstance(m.get("content"), str)]
        prompts = [self.render_prompt(messages[:i], position, slots) for i in indices]
        turns = [
            (before, self.render_answer(messages[i]["content"], before)) for i, before in zip(indices, prompts, strict=True)
        ]
        if not turns:
            return [], []
        ids = [*turns[-1][0], *turns[-1][1]]
        spans = [
            range(len(before), len(before) + len(answer))
            for before, answer in turns
            if ids[: len(before) + len(answer)] == [*before, *answer]
        ]
        return ids, spans

    def check_slots(self, ids: Sequence[int], slots: Sequence[int]) -> None:
        """Raise UsageError unless the slot tokens of a prompt are exactly those of its prefix.

        Args:
            ids: token ids of the prompt.
            slots: expected ids of the slot tokens, in order.
        """
        if [i for i in ids if i >= self.first_slot] != list(slots):
            raise UsageError("a message contains the text of a slot token; only a prefix can insert slot tokens")

    def slot_text(self, slots: Sequence[int]) -> str:
        """Return the text that the tokenizer maps to exactly these slot tokens."""
        return "".join(format_slot_token(slot - self.first_slot) for slot in slots)

    def fold_system_message(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """Copy messages for the template; their contents are shared with the originals.

        If the template renders no system message, its text is moved to the start of the first user message.
        """
        copied = [dict(m) for m in messages]
        first_user = next((m for m in copied if m.get("role") == "user"), None)
        if self.takes_system or first_user is None or copied[0].get("role") not in SYSTEM_ROLES:
            return copied
        content = copied[0].get("content") or ""
        parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
        text = "\n".join(part["text"] for part in parts if part.get("type") == "text")
        first_user["content"] = _prepend(first_user.get("content"), f"{text}\n\n")
        return copied[1:]

    def insert_slot_tokens(self, messages: Sequence[Message], position: Position, slots: Sequence[int]) -> list[dict[str, Any]]:
        """Insert slot tokens into a copy of the messages.

        At `system` and `system-end`, a conversation without a system message gets one. It consists of the slot tokens alone, or
        at `system-end` of the template's default system message and the slot tokens.

        Args:
            messages: messages of the conversation.
            position: `system`, `system-end`, `user` (start of the first user message) or `user-end` (end of the last one).
            slots: ids of the slot tokens to insert.

        Raises:
            UsageError: if the template renders no system message, or the position is in a user message and there is none.
        """
        text = self.slot_text(slots)
        marked = self.fold_system_message(messages)
        if position in ("user", "user-end"):
            users = [m for m in marked if m.get("role") == "user"]
            if not users:
                raise UsageError("this prefix goes into a user message, and the conversation has none")
            message, insert = (users[0], _prepend) if position == "user" else (users[-1], _append)
            message["content"] = insert(message.get("content"), text)
            return marked
        if not self.takes_system:
            raise UsageError("this chat template takes no system message; use position user, user-end or start")
        if not marked or marked[0].get("role") not in SYSTEM_ROLES:
            default = (self.default_system or "") if position == "system-end" else ""
            return [{"role": "system", "content": default + text}, *marked]
        insert = _append if position == "system-end" else _prepend
        marked[0]["content"] = insert(marked[0].get("content"), text)
        return marked

    def insert_slots_at_start(self, ids: Sequence[int], slots: Sequence[int]) -> list[int]:
        """Insert slot tokens at the start, after the beginning-of-sequence token if there is one."""
        # In some chat templates the BOS token also opens each turn; only a token that occurs once marks the beginning.
        bos = self.tokenizer.bos_token_id
        head = 1 if ids and ids[0] == bos and bos not in ids[1:] else 0
        return [*ids[:head], *slots, *ids[head:]]


def build_renderer(base: BaseModel, slots: int) -> ChatRenderer:
    """Build the chat renderer of a base model; the result is cached.

    Args:
        base: base model.
        slots: number of slot tokens.

    Raises:
        UsageError: if the model has no chat template, or its tokenizer cannot append tokens.
    """
    return _renderer(base, slots)


def format_slot_token(index: int) -> str:
    """Return the text of a slot token by its index, counted from 0."""
    return f"<|trimtab_slot_{index}|>"


@lru_cache(maxsize=8)
def _renderer(base: BaseModel, slots: int) -> ChatRenderer:
    tokenizer = base.tokenizer()
    if not tokenizer.chat_template:
        raise UsageError(f"base model {base.name} has no chat template; trimtab steers chat models")
    turn_end, takes_system, default_system = _turn_end(tokenizer), *_system(tokenizer)
    first = max(max(tokenizer.get_vocab().values()) + 1, len(tokenizer))
    tokens = [AddedToken(format_slot_token(i), special=True, normalized=False) for i in range(slots)]
    tokenizer.add_tokens(tokens, special_tokens=True)
    ids = tokenizer.convert_tokens_to_ids([format_slot_token(i) for i in range(slots)])
    if ids != list(range(first, first + slots)):
        raise UsageError(f"the tokenizer of {base.name} does not take new tokens at the end of its vocabulary")
    return ChatRenderer(tokenizer, first, slots, turn_end, takes_system, default_system, _answer_start(tokenizer))


def _turn_end(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the first special token that the template writes after an answer; it may differ from the end-of-sequence token."""
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": PROBE}]
    after = str(tokenizer.apply_chat_template(messages, tokenize=False)).rpartition(PROBE)[2]
    added = tokenizer.added_tokens_decoder
    ends = (i for i in tokenizer.encode(after, add_special_tokens=False) if i in added and added[i].special)
    return next(ends, tokenizer.eos_token_id)  # pyright: ignore[reportReturnType]


def _answer_start(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the ids that the template writes before an answer, by rendering with and without a generation prompt."""
    user = [{"role": "user", "content": "x"}]
    apply: Any = tokenizer.apply_chat_template
    without, complete = (
        list(apply(user, add_generation_prompt=start, tokenize=True, return_dict=False)) for start in (False, True)
    )
    return tuple(complete[len(without) :]) if complete[: len(without)] == without else ()


def _system(tokenizer: PreTrainedTokenizerBase) -> tuple[bool, str | None]:
    """Detect whether the template renders a system message, and its default one, by rendering with and without one."""
    user = {"role": "user", "content": "x"}
    try:
        rendered = str(tokenizer.apply_chat_template([{"role": "system", "content": PROBE}, user], tokenize=False))
    except Exception:  # templates raise their own errors, of any type
        return False, None
    before, found, after = rendered.partition(PROBE)
    default = str(tokenizer.apply_chat_template([user], tokenize=False))
    if not found or not default.startswith(before) or not default.endswith(after):
        return bool(found), None
    return True, default[len(before) : len(default) - len(after)] or None


def _prepend(content: Any, text: str) -> Any:
    return _insert(content, text, at_end=False)


def _append(content: Any, text: str) -> Any:
    return _insert(content, text, at_end=True)


def _insert(content: Any, text: str, *, at_end: bool) -> Any:
    """Insert text into a string, or into the first or last part of a list of parts."""
    if content is None or isinstance(content, str):
        return (content or "") + text if at_end else text + (content or "")
    if not isinstance(content, list):
        raise UsageError("a message's content must be text or a list of parts")
    index = -1 if at_end else 0
    if content and isinstance(content[index], dict) and content[index].get("type") == "text":
        part = {**content[index], "text": _insert(content[index].get("text"), text, at_end=at_end)}
        return [*content[:-1], part] if at_end else [part, *content[1:]]
    new = {"type": "text", "text": text}
    return [*content, new] if at_end else [new, *content]
