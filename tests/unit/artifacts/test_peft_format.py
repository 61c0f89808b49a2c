"""Prefixes elsewhere: as adapters of the real PEFT, both ways, and in plain transformers' `generate`."""

import json
import pickle
from dataclasses import replace

import pytest
import torch
from peft import PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file

from tests.support import tiny_models
from tests.support.factories import QUESTIONS, TOKENS, make_prefix, reference
from trimtab.artifacts.card import PrefixCard
from trimtab.artifacts.prefix import build_prefix, load_prefix, save_prefix
from trimtab.cli.main import main
from trimtab.errors import ArtifactError, UsageError
from trimtab.generate import build_inputs
from trimtab.generation_types import Conversation
from trimtab.model.chat_template import build_renderer
from trimtab.model.frozen_model import FrozenModel
from trimtab.peft_format import export_adapter, import_adapter
from trimtab.types import POSITIONS

ASK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is the capital of France?"}]
# A Gemma scales its embeddings; this one's prompts begin with no BOS.
SCALED = tiny_models.Family("gemma3_text", tiny_models.CHATML, tiny_models.IM, "<|im_end|>", True, options=tiny_models.SLIDING)


@pytest.fixture(scope="module", params=["default", "scaled"])
def both(request, tmp_path_factory):
    """A base model and it loaded: the default one, and one that scales its embeddings."""
    if request.param == "default":
        base = request.getfixturevalue("base")
    else:
        base = tiny_models.make(SCALED, tmp_path_factory.mktemp("models") / "scaled")
    return base, base.load("fp32")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A base model that costs nothing, for files."""
    return tiny_models.make(tiny_models.FAMILIES["qwen3"], tmp_path_factory.mktemp("models") / "small")


def new(base, rows=2, position="start"):
    torch.manual_seed(1)
    vectors = torch.randn(rows, base.width) / 3
    return build_prefix(vectors, PrefixCard("prefix", "p", base.name, base.fingerprint, position, 0, 0, ""))


def next_logits(base, model, prefix):
    """trimtab's own logits after a prompt."""
    renderer = build_renderer(base, 8)
    rows = range(renderer.first_slot, renderer.first_slot + len(prefix.vectors))
    with torch.no_grad():
        frozen = FrozenModel(model, renderer.first_slot)
        return frozen.target_logits(prefix.vectors, [[*renderer.render_prompt(ASK, "start", rows), 0]], [1])[0]


def peft_logits(base, adapted):
    with torch.no_grad():
        return adapted(torch.tensor([build_renderer(base, 8).render_prompt(ASK)])).logits[0, -1]


def test_round_trip_is_exact(base, tmp_path):
    prefix = new(base)
    again = import_adapter(export_adapter(prefix, tmp_path / "adapter", base), base, "p")
    assert torch.equal(again.vectors, prefix.vectors)
    assert again.salt == prefix.salt
    assert again.card.position == "start"
    assert load_prefix(save_prefix(again, tmp_path / "again"), base).card == again.card


def test_an_exported_prefix_does_the_same_in_peft(both, tmp_path):
    base, model = both
    prefix = new(base)
    wanted = next_logits(base, model, prefix)
    adapted = PeftModel.from_pretrained(model, export_adapter(prefix, tmp_path, base))
    assert torch.allclose(peft_logits(base, adapted), wanted, atol=1e-4)
    assert not torch.allclose(model(torch.tensor([build_renderer(base, 8).render_prompt(ASK)])).logits[0, -1], wanted, atol=0.1)


def test_an_adapter_of_peft_does_the_same_here(both, tmp_path):
    base, model = both
    torch.manual_seed(2)
    adapted = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    adapted.eval().save_pretrained(tmp_path)
    prefix = import_adapter(tmp_path, base, "theirs")
    assert prefix.card.num_virtual_tokens == 3
    assert prefix.card.method["base_model_name_or_path"] == str(base.path)
    assert torch.allclose(peft_logits(base, adapted), next_logits(base, model, prefix), atol=1e-4)


def test_scaled_embeddings_are_met_on_both_ways(tmp_path):
    base = tiny_models.make(SCALED, tmp_path / "model")
    prefix = new(base)
    adapter = export_adapter(prefix, tmp_path / "adapter", base)
    assert torch.equal(load_file(adapter / "adapter_model.safetensors")["prompt_embeddings"], prefix.vectors * 8)
    assert torch.equal(import_adapter(adapter, base, "p").vectors, prefix.vectors)


def test_only_the_start_of_a_prompt_without_bos_is_interchanged(small, tmp_path):
    with pytest.raises(UsageError, match="has position system; PEFT knows only the start"):
        export_adapter(new(small, position="system"), tmp_path / "a", small)
    with pytest.raises(ArtifactError, match="Train it again"):
        export_adapter(new(small), tmp_path / "b", replace(small, fingerprint="0" * 16))
    llama = tiny_models.make(tiny_models.FAMILIES["llama"], tmp_path / "llama")
    with pytest.raises(UsageError, match="begin with a BOS token: PEFT puts vectors before it"):
        export_adapter(new(llama), tmp_path / "c", llama)
    with pytest.raises(UsageError, match="begin with a BOS token"):
        import_adapter(export_adapter(new(small), tmp_path / "d", small), llama, "p")


def _tensors(folder, **tensors):
    save_file(tensors, folder / "adapter_model.safetensors")


def _config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _pickled(folder):
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"prompt_embeddings": torch.zeros(2, 64)}, folder / "adapter_model.bin")


DAMAGES = {
    "NaN": (lambda f: _tensors(f, prompt_embeddings=torch.full((2, 64), float("nan"))), "NaN or infinity"),
    "wrong width": (lambda f: _tensors(f, prompt_embeddings=torch.zeros(2, 32)), "has width 32; base model small has 64"),
    "too many rows": (lambda f: _tensors(f, prompt_embeddings=torch.zeros(65, 64)), "1 to 64"),
    "no rows": (lambda f: _tensors(f, prompt_embeddings=torch.zeros(0, 64)), "1 to 64"),
    "one dimension": (lambda f: _tensors(f, prompt_embeddings=torch.zeros(64)), "must be numbers [k, d]"),
    "whole numbers": (lambda f: _tensors(f, prompt_embeddings=torch.zeros(2, 64, dtype=torch.int8)), "must be numbers [k, d]"),
    "other tensor": (lambda f: _tensors(f, lora_A=torch.zeros(2, 64)), "one tensor named prompt_embeddings"),
    "a head too": (lambda f: _tensors(f, prompt_embeddings=torch.zeros(2, 64), head=torch.zeros(1)), "one tensor named"),
    "truncated": (
        lambda f: (f / "adapter_model.safetensors").write_bytes((f / "adapter_model.safetensors").read_bytes()[:-9]),
        "not a whole safetensors",
    ),
    "pickle by that name": (
        lambda f: (f / "adapter_model.safetensors").write_bytes(pickle.dumps([1])),
        "not a whole safetensors",
    ),
    "pickled": (_pickled, "is a pickle"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "has no adapter_config.json"),
    "config is not JSON": (lambda f: (f / "adapter_config.json").write_text("{"), "not readable JSON"),
    "config is a list": (lambda f: (f / "adapter_config.json").write_text("[]"), "not the config of an adapter"),
    "LoRA": (lambda f: _config(f, peft_type="LORA"), "peft_type 'LORA' is not supported"),
    "encoder and decoder": (lambda f: _config(f, task_type="SEQ_2_SEQ_LM"), "is not a causal language model"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_refused_in_one_line(small, tmp_path, name):
    damage, expected = DAMAGES[name]
    folder = export_adapter(new(small), tmp_path / "adapter", small)
    damage(folder)
    with pytest.raises(ArtifactError) as caught:
        import_adapter(folder, small, "p")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_half_precision_is_read(small, tmp_path):
    folder = export_adapter(new(small), tmp_path / "adapter", small)
    _tensors(folder, prompt_embeddings=new(small).vectors.bfloat16())
    assert torch.equal(import_adapter(folder, small, "p").vectors, new(small).vectors.bfloat16().float())


def test_the_commands(small, tmp_path, capsys):
    mine, adapter, again = (str(tmp_path / name) for name in ("mine", "adapter", "again"))
    save_prefix(new(small), tmp_path / "mine")
    assert main(["export", mine, "--out", adapter, "--base", str(small.path)]) == 0
    assert main(["import", adapter, "--name", "again", "--out", again, "--base", str(small.path)]) == 0
    assert torch.equal(load_prefix(tmp_path / "again", small).vectors, new(small).vectors)
    assert main(["import", mine, "--name", "again", "--out", again, "--base", str(small.path)]) == 2
    assert "has no adapter_config.json" in capsys.readouterr().err


def equal(frozen, base, prefix, questions):
    """Whether a left-padded batch of generate gives what one request at a time does; gives its token ids back."""
    conversations = [[{"role": "user", "content": q}] for q in questions]
    given = build_inputs(frozen.model, base, conversations, prefix)
    assert given["attention_mask"][:, -1].all()
    assert not given["attention_mask"].all()
    answers = frozen.model.generate(**given, max_new_tokens=TOKENS, do_sample=False).tolist()
    for answer, conversation in zip(answers, conversations, strict=True):
        wanted = reference(frozen, base, Conversation(conversation, prefix), TOKENS)
        assert answer[: len(wanted)] == wanted
    return answers


def test_generate_equals_the_reference_in_a_left_padded_batch(small):
    frozen = FrozenModel(small.load("fp32"), build_renderer(small, 8).first_slot)
    plain = equal(frozen, small, None, QUESTIONS)
    for rows, position in enumerate(POSITIONS, 1):
        steered = equal(frozen, small, make_prefix(frozen, small, "p", rows, position, rows), QUESTIONS)
        assert sum(a != b for a, b in zip(steered, plain, strict=True)) > 3


def test_generate_with_the_default_model(frozen, base, three):
    equal(frozen, base, three[2], QUESTIONS[:2])


def test_inputs_are_checked(frozen, base, small):
    with pytest.raises(UsageError, match="slot token"):
        build_inputs(frozen.model, base, [[{"role": "user", "content": "Say <|trimtab_slot_0|>"}]])
    prefix = make_prefix(frozen, base, "one", 1, "user", 1)
    with pytest.raises(UsageError, match="slot token"):
        build_inputs(frozen.model, base, [[{"role": "user", "content": "Say <|trimtab_slot_1|>"}]], prefix)
    with pytest.raises(ArtifactError, match=r"made for base model .* \(width 64, "):
        build_inputs(frozen.model, base, [ASK], new(small))
