"""Model families: rendering, logits and answers on tiny random checkpoints, compared with transformers."""

import json
import shutil

import pytest
import torch
from transformers import LlamaConfig

from tests.support import tiny_models
from tests.support.factories import QUESTIONS
from trimtab.artifacts.card import PrefixCard
from trimtab.artifacts.prefix import build_prefix
from trimtab.engine.config import EngineConfig
from trimtab.engine.offline import Engine
from trimtab.errors import UsageError
from trimtab.generate import build_inputs
from trimtab.generation_types import Conversation, Sampling
from trimtab.model.base_model import resolve_base_model
from trimtab.model.chat_template import build_renderer
from trimtab.model.frozen_model import FrozenModel
from trimtab.types import POSITIONS

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "What is the capital of France?"}
ANSWER = {"role": "assistant", "content": "It is Paris."}
NO_SYSTEM = ("gemma2", "gemma3")
# The first has an untied head and embedding rows without a token; the second scaled embeddings and a tied, capped head.
ENGINES = ("qwen3", "gemma2")
THINKING = tiny_models.Family("qwen3", tiny_models.THINKING, tiny_models.IM, "<|im_end|>", False)
SILENT = tiny_models.Family("llama", tiny_models.NO_SYSTEM, tiny_models.IM, "<|im_end|>", False)


@pytest.fixture(scope="module")
def family_models(tmp_path_factory):
    """Base models by family."""
    folder = tmp_path_factory.mktemp("families")
    return {name: tiny_models.make_base_model(family, folder / name) for name, family in tiny_models.FAMILIES.items()}


@pytest.fixture(params=tiny_models.FAMILIES)
def family_model(request, family_models):
    return family_models[request.param]


def list_positions(name):
    return [position for position in POSITIONS if name not in NO_SYSTEM or not position.startswith("system")]


def make_random_prefix(base, position, rows=2):
    """Return a random prefix whose rows are about as long as token embeddings, so that it changes answers."""
    torch.manual_seed(rows)
    return build_prefix(
        torch.randn(rows, base.width) / 2, PrefixCard("prefix", position, base.name, base.fingerprint, position, 0, 0, "")
    )


def test_rendering_inserts_rows_and_changes_nothing_else(family_model):
    renderer = build_renderer(family_model, 4)
    rows = [renderer.first_slot, renderer.first_slot + 2]
    assert renderer.first_slot == len(family_model.tokenizer()) <= family_model.vocabulary
    for position in list_positions(family_model.name):
        messages = [USER] if family_model.name in NO_SYSTEM or position != "system" else [SYSTEM, USER]
        ids = renderer.render_prompt(messages, position, rows)
        assert [token_id for token_id in ids if token_id >= renderer.first_slot] == rows
        if position != "system-end":
            assert [token_id for token_id in ids if token_id < renderer.first_slot] == renderer.render_prompt(messages)
    start = renderer.render_prompt([USER], "start", rows)
    bos = int(start[0] == renderer.tokenizer.bos_token_id)
    assert start[bos : bos + 2] == rows
    assert bos == (tiny_models.FAMILIES[family_model.name].template.startswith("{{ bos_token }}"))


def test_answers_end_with_the_turn_token_of_the_template(family_model):
    renderer = build_renderer(family_model, 4)
    family = tiny_models.FAMILIES[family_model.name]
    assert renderer.tokenizer.convert_ids_to_tokens(renderer.turn_end) == family.turn
    ids, spans = renderer.render_conversation([USER, ANSWER, USER, ANSWER], "user", [renderer.first_slot])
    answers = [renderer.tokenizer.decode(ids[span.start : span.stop]) for span in spans]
    # Mistral's template shows earlier answers with a space before them.
    assert answers == ["It is Paris." + family.turn] * (1 if family_model.name == "mistral" else 2)


def test_target_logits_equal_the_full_model(family_model):
    """Two prompts of different length with vectors; the reference concatenates the embeddings of each."""
    renderer = build_renderer(family_model, 4)
    loaded = family_model.load("fp32")
    frozen = FrozenModel(loaded, renderer.first_slot)
    vectors = make_random_prefix(family_model, "user").vectors
    rows = [renderer.first_slot, renderer.first_slot + 1]
    conversations = [[USER, ANSWER], [{"role": "user", "content": QUESTIONS[1]}, ANSWER]]
    ids = [renderer.render_conversation(messages, "user", rows)[0] for messages in conversations]
    targets = [len(renderer.render_answer(ANSWER["content"])), 3]
    with torch.no_grad():
        logits = frozen.target_logits(vectors, ids, targets)
        scale = family_model.width**0.5 if family_model.name.startswith("gemma") else 1.0
        table = loaded.get_input_embeddings().weight
        expected: list[torch.Tensor] = []
        for row, count in zip(ids, targets, strict=True):
            start = row.index(rows[0])
            embedded = torch.cat([table[row[:start]], vectors, table[row[start + 2 :]]]) * scale
            expected.append(loaded(inputs_embeds=embedded[None], use_cache=False).logits[0, -count - 1 : -1])
        plain = frozen.target_logits(
            None, [[token_id for token_id in row if token_id < renderer.first_slot] for row in ids], targets
        )
    assert torch.allclose(logits, torch.cat(expected), atol=1e-4)
    assert not torch.allclose(plain, torch.cat(expected), atol=0.1), "the vectors must change the logits"


def test_supports_the_head(family_model):
    FrozenModel(family_model.load("fp32"), build_renderer(family_model, 4).first_slot).check_head()


def test_rejects_unknown_logit_scaling(family_models):
    loaded = family_models["gemma2"].load("fp32")
    frozen = FrozenModel(loaded, 400)
    loaded.config.final_logit_softcapping = 2.0
    frozen.check_head()
    # Scaling that only the model knows, as in a new family.
    forward = loaded.forward
    loaded.forward = lambda **inputs: halve_logits(forward(**inputs))
    with pytest.raises(UsageError, match="computes its logits in a way that trimtab does not support"):
        frozen.check_head()


def halve_logits(output):
    output.logits = output.logits / 2
    return output


@pytest.mark.parametrize("name", NO_SYSTEM)
def test_template_without_system_turn_allows_other_positions(family_models, name):
    renderer = build_renderer(family_models[name], 4)
    rows = [renderer.first_slot]
    for position in ("system", "system-end"):
        with pytest.raises(UsageError, match="takes no system message; use position user, user-end or start"):
            renderer.render_prompt([USER], position, rows)
    with pytest.raises(UsageError) as error:
        renderer.render_prompt([SYSTEM])
    assert str(error.value) == "the chat template does not take these messages: System role not supported"
    # A system message is put before the user's text, because prefixes are trained with system messages.
    assert renderer.render_prompt([SYSTEM, USER]) == renderer.render_prompt(
        [USER | {"content": f"Be brief.\n\n{USER['content']}"}]
    )
    prompt = renderer.tokenizer.decode(renderer.render_prompt([USER], "user", rows))
    assert "<start_of_turn>user\n<|trimtab_slot_0|>What" in prompt


def test_detects_template_that_drops_the_system_turn(tmp_path):
    renderer = build_renderer(tiny_models.make_base_model(SILENT, tmp_path), 4)
    assert not renderer.takes_system
    assert "Be brief.\n\nWhat" in renderer.tokenizer.decode(renderer.render_prompt([SYSTEM, USER]))
    with pytest.raises(UsageError, match="takes no system message"):
        renderer.render_prompt([SYSTEM, USER], "system", [renderer.first_slot])


def test_system_end_keeps_the_default_system_text(family_models):
    renderer = build_renderer(family_models["qwen2"], 4)
    prompt = renderer.tokenizer.decode(renderer.render_prompt([USER], "system-end", [renderer.first_slot]))
    assert prompt.startswith("<|im_start|>system\nYou are a helpful assistant.<|trimtab_slot_0|><|im_end|>")
    assert build_renderer(family_models["qwen3"], 4).default_system is None


def test_answer_continues_an_open_thinking_block(tmp_path):
    renderer = build_renderer(tiny_models.make_base_model(THINKING, tmp_path), 4)
    decode = renderer.tokenizer.decode
    answer = "Let me think.\n</think>\n\nIt is Paris."
    for content in (answer, "<think>\n" + answer, "\n <think>" + answer):
        messages = [USER, {"role": "assistant", "content": content}]
        ids, (span,) = renderer.render_conversation(messages, "system", [renderer.first_slot])
        assert decode(ids).endswith("<|im_start|>assistant\n<think>\n" + answer + "<|im_end|>")
        assert decode(ids).count("<think>") == 1
        assert ids[: span.start] == renderer.render_prompt([USER], "system", [renderer.first_slot])
        assert decode(ids[span.start : span.stop]) == answer + "<|im_end|>"
    # The template removes the thoughts of earlier answers. Such an answer was not generated like that, and is no target.
    ids, spans = renderer.render_conversation([*messages, USER, ANSWER], "user", [renderer.first_slot])
    assert [decode(ids[span.start : span.stop]) for span in spans] == ["It is Paris.<|im_end|>"]
    assert "Let me think" not in decode(ids)


def test_answer_opens_a_thinking_block(family_models):
    renderer = build_renderer(family_models["qwen3"], 4)
    ids, _ = renderer.render_conversation([USER, {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nParis."}])
    assert renderer.tokenizer.decode(ids).endswith("assistant\n<think>\nHm.\n</think>\n\nParis.<|im_end|>")


@pytest.mark.slow
@pytest.mark.parametrize("name", ENGINES)
def test_engine_answers_equal_transformers(family_models, name, tmp_path, monkeypatch):
    # The engine writes a tokenizer into its home; those of tiny models are not needed later.
    monkeypatch.setenv("TRIMTAB_HOME", str(tmp_path))
    base = family_models[name]
    loaded = base.load("fp32")
    prefixes = [None, *(make_random_prefix(base, position, rows) for rows, position in enumerate(list_positions(name), 1))]
    conversations = [[{"role": "user", "content": question}] for question in QUESTIONS]
    # The engine never returns an id without a token; a random transformers model does.
    spare = list(range(len(base.tokenizer()), base.vocabulary)) or None
    expected = [
        loaded.generate(
            **build_inputs(loaded, base, [messages], prefix), max_new_tokens=12, do_sample=False, suppress_tokens=spare
        )[0].tolist()
        for prefix in prefixes
        for messages in conversations
    ]
    assert sum(
        answer != plain_ids for answer, plain_ids in zip(expected, expected[: len(conversations)] * len(prefixes), strict=True)
    ) > 3 * len(prefixes[1:])
    with Engine(base, EngineConfig(num_slots=16, dtype="fp32", max_model_len=128)) as engine:
        answers = engine.chat_many(
            [Conversation(messages, prefix) for prefix in prefixes for messages in conversations], Sampling(max_tokens=12)
        )
    assert [list(answer.token_ids) for (answer,) in answers] == expected


def test_missing_size_is_the_default_of_the_family(tiny_base, tmp_path):
    folder = shutil.copytree(tiny_base.path, tmp_path / "short")
    config = json.loads((folder / "config.json").read_text())
    del config["num_hidden_layers"]
    (folder / "config.json").write_text(json.dumps(config))
    resolved = resolve_base_model(str(folder))
    assert (resolved.width, resolved.vocabulary) == (tiny_base.width, tiny_base.vocabulary)
    assert resolved.depth == LlamaConfig().num_hidden_layers
