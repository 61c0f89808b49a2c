"""Chat renderer: positions of slot tokens, and unchanged text around them."""

import pytest

from trimtab.errors import UsageError
from trimtab.model.chat_template import build_renderer

USER = {"role": "user", "content": "Hello"}
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.fixture(scope="module")
def renderer(base):
    return build_renderer(base, 4)


def render_text(renderer, messages, position):
    rows = [renderer.first_slot, renderer.first_slot + 2]
    ids = renderer.render_prompt(messages, position, rows)
    assert [i for i in ids if i >= renderer.first_slot] == rows
    return renderer.tokenizer.decode(ids).replace("<|trimtab_slot_0|><|trimtab_slot_2|>", "@")


@pytest.mark.parametrize(
    ("position", "messages", "expected"),
    [
        ("system", [USER], "<|im_start|>system\n@<|im_end|>\n<|im_start|>user\nHello"),
        ("system", [SYSTEM, USER], "<|im_start|>system\n@Be brief.<|im_end|>"),
        ("system-end", [USER], "trained by Hugging Face@<|im_end|>"),
        ("system-end", [SYSTEM, USER], "<|im_start|>system\nBe brief.@<|im_end|>"),
        ("user", [SYSTEM, USER], "Be brief.<|im_end|>\n<|im_start|>user\n@Hello<|im_end|>"),
        ("user-end", [SYSTEM, USER], "user\nHello@<|im_end|>"),
        ("user-end", [USER, {"role": "assistant", "content": "Hi"}, USER], "Hi<|im_end|>\n<|im_start|>user\nHello@<|im_end|>"),
        ("start", [SYSTEM, USER], "@<|im_start|>system\nBe brief."),
    ],
)
def test_slot_tokens_are_at_their_position(renderer, position, messages, expected):
    assert expected in render_text(renderer, messages, position)


@pytest.mark.parametrize("text", ["Hello", " hello", "\nx", "1", "<|im", ""])
def test_slot_tokens_survive_adjacent_text(renderer, text):
    rows = [renderer.first_slot + 1]
    ids = renderer.render_prompt([{"role": "system", "content": text}, USER], "system", rows)
    assert ids.count(rows[0]) == 1


def test_prompt_without_slots_equals_the_template(renderer, base):
    plain = base.tokenizer().apply_chat_template([SYSTEM, USER], add_generation_prompt=True, return_dict=False)
    assert renderer.render_prompt([SYSTEM, USER]) == list(plain)


def test_content_parts_and_developer_role(renderer):
    rows = [renderer.first_slot]
    parts = [{"role": "developer", "content": [{"type": "text", "text": "Be kind."}]}, USER]
    marked = renderer.insert_slot_tokens(parts, "system", rows)
    assert marked[0]["content"] == [{"type": "text", "text": "<|trimtab_slot_0|>Be kind."}]
    assert parts[0]["content"] == [{"type": "text", "text": "Be kind."}], "the caller's messages must not change"


def test_user_position_requires_a_user_message(renderer):
    with pytest.raises(UsageError, match="into a user message"):
        renderer.insert_slot_tokens([SYSTEM], "user", [renderer.first_slot])


def test_answer_ends_the_turn(renderer):
    assert renderer.render_answer(" Yes. ")[-1] == renderer.tokenizer.eos_token_id
    assert renderer.tokenizer.decode(renderer.render_answer(" Yes. ")) == "Yes.<|im_end|>"


def test_conversation_has_spans_of_its_answers(renderer):
    turns = [SYSTEM, USER, {"role": "assistant", "content": "Hi there."}, USER, {"role": "assistant", "content": "Again!"}]
    for position in ("system", "user", "start"):
        ids, spans = renderer.render_conversation(turns, position, [renderer.first_slot])
        assert [renderer.tokenizer.decode(ids[s.start : s.stop]) for s in spans] == ["Hi there.<|im_end|>", "Again!<|im_end|>"]
        assert spans[-1].stop == len(ids)
        assert ids[: spans[-1].start] == renderer.render_prompt(turns[:-1], position, [renderer.first_slot])
    assert renderer.render_conversation([USER]) == ([], [])
