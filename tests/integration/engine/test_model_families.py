"""Families of models: the same rendering, logits and answers as transformers gives, on tiny random checkpoints of each."""

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
# One with an untied head and rows without a token, one with scaled embeddings, a capped head and a tied one.
ENGINES = ("qwen3", "gemma2")
THINKING = tiny_models.Family("qwen3", tiny_models.THINKING, tiny_models.IM, "<|im_end|>", False)
SILENT = tiny_models.Family("llama", tiny_models.NO_SYSTEM, tiny_models.IM, "<|im_end|>", False)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Base models by family, each made once."""
    folder = tmp_path_factory.mktemp("families")
    return {name: tiny_models.make(family, folder / name) for name, family in tiny_models.FAMILIES.items()}


@pytest.fixture(params=tiny_models.FAMILIES)
def model(request, models):
    return models[request.param]


def places(name):
    return [p for p in POSITIONS if name not in NO_SYSTEM or not p.startswith("system")]


def new(base, position, rows=2):
    """A prefix of rows of about the length of the table's, so that it changes answers."""
    torch.manual_seed(rows)
    return build_prefix(
        torch.randn(rows, base.width) / 2, PrefixCard("prefix", position, base.name, base.fingerprint, position, 0, 0, "")
    )


def test_rows_are_put_in_and_nothing_else_changes(model):
    renderer = build_renderer(model, 4)
    rows = [renderer.first_slot, renderer.first_slot + 2]
    assert renderer.first_slot == len(model.tokenizer()) <= model.vocabulary
    for position in places(model.name):
        given = [USER] if model.name in NO_SYSTEM or position != "system" else [SYSTEM, USER]
        ids = renderer.render_prompt(given, position, rows)
        assert [i for i in ids if i >= renderer.first_slot] == rows
        if position != "system-end":
            assert [i for i in ids if i < renderer.first_slot] == renderer.render_prompt(given)
    start = renderer.render_prompt([USER], "start", rows)
    bos = int(start[0] == renderer.tokenizer.bos_token_id)
    assert start[bos : bos + 2] == rows
    assert bos == (tiny_models.FAMILIES[model.name].template.startswith("{{ bos_token }}"))


def test_answers_end_as_the_template_ends_them(model):
    renderer = build_renderer(model, 4)
    family = tiny_models.FAMILIES[model.name]
    assert renderer.tokenizer.convert_ids_to_tokens(renderer.turn_end) == family.turn
    ids, spans = renderer.render_conversation([USER, ANSWER, USER, ANSWER], "user", [renderer.first_slot])
    said = [renderer.tokenizer.decode(ids[s.start : s.stop]) for s in spans]
    # Mistral's template shows earlier answers with a space before them.
    assert said == ["It is Paris." + family.turn] * (1 if model.name == "mistral" else 2)


def test_target_logits_are_those_of_the_whole_model(model):
    """Two prompts of unlike length, with vectors in place; the reference puts each one's embeddings together by hand."""
    renderer = build_renderer(model, 4)
    loaded = model.load("fp32")
    frozen = FrozenModel(loaded, renderer.first_slot)
    vectors = new(model, "user").vectors
    rows = [renderer.first_slot, renderer.first_slot + 1]
    asks = [[USER, ANSWER], [{"role": "user", "content": QUESTIONS[1]}, ANSWER]]
    ids = [renderer.render_conversation(a, "user", rows)[0] for a in asks]
    targets = [len(renderer.render_answer(ANSWER["content"])), 3]
    with torch.no_grad():
        ours = frozen.target_logits(vectors, ids, targets)
        scale = model.width**0.5 if model.name.startswith("gemma") else 1.0
        table = loaded.get_input_embeddings().weight
        wanted: list[torch.Tensor] = []
        for row, count in zip(ids, targets, strict=True):
            at = row.index(rows[0])
            embedded = torch.cat([table[row[:at]], vectors, table[row[at + 2 :]]]) * scale
            wanted.append(loaded(inputs_embeds=embedded[None], use_cache=False).logits[0, -count - 1 : -1])
        plain = frozen.target_logits(None, [[i for i in row if i < renderer.first_slot] for row in ids], targets)
    assert torch.allclose(ours, torch.cat(wanted), atol=1e-4)
    assert not torch.allclose(plain, torch.cat(wanted), atol=0.1), "the vectors must matter"


def test_the_head_is_known(model):
    FrozenModel(model.load("fp32"), build_renderer(model, 4).first_slot).check_head()


def test_a_head_of_its_own_kind_is_refused(models):
    loaded = models["gemma2"].load("fp32")
    frozen = FrozenModel(loaded, 400)
    loaded.config.final_logit_softcapping = 2.0
    frozen.check_head()
    # Known to the model only, as a new family's own scaling would be.
    head = loaded.forward
    loaded.forward = lambda **given: _halved(head(**given))
    with pytest.raises(UsageError, match="computes its logits in a way that trimtab does not support"):
        frozen.check_head()


def _halved(output):
    output.logits = output.logits / 2
    return output


@pytest.mark.parametrize("name", NO_SYSTEM)
def test_a_template_without_system_turn_takes_other_places(models, name):
    renderer = build_renderer(models[name], 4)
    rows = [renderer.first_slot]
    for position in ("system", "system-end"):
        with pytest.raises(UsageError, match="takes no system message; use place user or start"):
            renderer.render_prompt([USER], position, rows)
    with pytest.raises(UsageError) as caught:
        renderer.render_prompt([SYSTEM])
    assert str(caught.value) == "the chat template does not take these messages: System role not supported"
    # A system message goes where the user's words begin, as prefixes are trained beside one.
    assert renderer.render_prompt([SYSTEM, USER]) == renderer.render_prompt(
        [USER | {"content": f"Be brief.\n\n{USER['content']}"}]
    )
    shown = renderer.tokenizer.decode(renderer.render_prompt([USER], "user", rows))
    assert "<start_of_turn>user\n<|trimtab_slot_0|>What" in shown


def test_a_template_that_drops_the_system_turn_is_found_out(tmp_path):
    renderer = build_renderer(tiny_models.make(SILENT, tmp_path), 4)
    assert not renderer.takes_system
    assert "Be brief.\n\nWhat" in renderer.tokenizer.decode(renderer.render_prompt([SYSTEM, USER]))
    with pytest.raises(UsageError, match="takes no system message"):
        renderer.render_prompt([SYSTEM, USER], "system", [renderer.first_slot])


def test_default_system_text_is_kept_at_its_end(models):
    renderer = build_renderer(models["qwen2"], 4)
    shown = renderer.tokenizer.decode(renderer.render_prompt([USER], "system-end", [renderer.first_slot]))
    assert shown.startswith("<|im_start|>system\nYou are a helpful assistant.<|trimtab_slot_0|><|im_end|>")
    assert build_renderer(models["qwen3"], 4).default_system is None


def test_answers_go_on_inside_a_thinking_block(tmp_path):
    renderer = build_renderer(tiny_models.make(THINKING, tmp_path), 4)
    decode = renderer.tokenizer.decode
    inside = "Let me think.\n</think>\n\nIt is Paris."
    for said in (inside, "<think>\n" + inside, "\n <think>" + inside):
        talk = [USER, {"role": "assistant", "content": said}]
        ids, (span,) = renderer.render_conversation(talk, "system", [renderer.first_slot])
        assert decode(ids).endswith("<|im_start|>assistant\n<think>\n" + inside + "<|im_end|>")
        assert decode(ids).count("<think>") == 1
        assert ids[: span.start] == renderer.render_prompt([USER], "system", [renderer.first_slot])
        assert decode(ids[span.start : span.stop]) == inside + "<|im_end|>"
    # The template shows an earlier answer without its thoughts: it was never said like that, and is not learned from.
    ids, spans = renderer.render_conversation([*talk, USER, ANSWER], "user", [renderer.first_slot])
    assert [decode(ids[s.start : s.stop]) for s in spans] == ["It is Paris.<|im_end|>"]
    assert "Let me think" not in decode(ids)


def test_a_thinking_block_that_the_prompt_has_not_opened_is_opened_by_the_answer(models):
    renderer = build_renderer(models["qwen3"], 4)
    ids, _ = renderer.render_conversation([USER, {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nParis."}])
    assert renderer.tokenizer.decode(ids).endswith("assistant\n<think>\nHm.\n</think>\n\nParis.<|im_end|>")


@pytest.mark.slow
@pytest.mark.parametrize("name", ENGINES)
def test_the_engine_answers_as_transformers_does(models, name, tmp_path, monkeypatch):
    # The engine keeps a tokenizer under its home; these are of no use to anyone.
    monkeypatch.setenv("TRIMTAB_HOME", str(tmp_path))
    base = models[name]
    loaded = base.load("fp32")
    made = [None, *(new(base, position, rows) for rows, position in enumerate(places(name), 1))]
    conversations = [[{"role": "user", "content": q}] for q in QUESTIONS]
    # The engine gives no id that has no token; a random model does.
    spare = list(range(len(base.tokenizer()), base.vocabulary)) or None
    wanted = [
        loaded.generate(**build_inputs(loaded, base, [c], p), max_new_tokens=12, do_sample=False, suppress_tokens=spare)[
            0
        ].tolist()
        for p in made
        for c in conversations
    ]
    assert sum(a != b for a, b in zip(wanted, wanted[: len(conversations)] * len(made), strict=True)) > 3 * len(made[1:])
    with Engine(base, EngineConfig(num_slots=16, dtype="fp32", max_model_len=128)) as engine:
        answers = engine.chat_many([Conversation(c, p) for p in made for c in conversations], Sampling(max_tokens=12))
    assert [list(a.token_ids) for (a,) in answers] == wanted


def test_a_size_that_a_config_leaves_out_is_that_of_its_family(small, tmp_path):
    copied = shutil.copytree(small.path, tmp_path / "short")
    config = json.loads((copied / "config.json").read_text())
    del config["num_hidden_layers"]
    (copied / "config.json").write_text(json.dumps(config))
    found = resolve_base_model(str(copied))
    assert (found.width, found.vocabulary) == (small.width, small.vocabulary)
    assert found.depth == LlamaConfig().num_hidden_layers
