"""Interchange of prefixes with PEFT, and prefixes in transformers' `generate`."""

import json
import pickle
from dataclasses import replace

import pytest
import torch
from peft import PeftModel, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file

from tests.support import tiny_models
from tests.support.factories import QUESTIONS, TOKENS, generate_reference, make_prefix
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

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is the capital of France?"}]
# Gemma scales its embeddings; the prompts of this family have no BOS token.
SCALED = tiny_models.Family("gemma3_text", tiny_models.CHATML, tiny_models.IM, "<|im_end|>", True, options=tiny_models.SLIDING)


@pytest.fixture(scope="module", params=["default", "scaled"])
def base_and_model(request, tmp_path_factory):
    """Base model and its loaded weights: the default one, and one that scales its embeddings."""
    if request.param == "default":
        base = request.getfixturevalue("base")
    else:
        base = tiny_models.make_base_model(SCALED, tmp_path_factory.mktemp("models") / "scaled")
    return base, base.load("fp32")


@pytest.fixture(scope="module")
def peft_base(tmp_path_factory):
    """Tiny base model for tests of files."""
    return tiny_models.make_base_model(tiny_models.FAMILIES["qwen3"], tmp_path_factory.mktemp("models") / "small")


def create_random_prefix(base, rows=2, position="start"):
    torch.manual_seed(1)
    vectors = torch.randn(rows, base.width) / 3
    return build_prefix(vectors, PrefixCard("prefix", "p", base.name, base.fingerprint, position, 0, 0, ""))


def compute_next_logits(base, model, prefix):
    """Logits of trimtab after a prompt."""
    renderer = build_renderer(base, 8)
    rows = range(renderer.first_slot, renderer.first_slot + len(prefix.vectors))
    with torch.no_grad():
        frozen = FrozenModel(model, renderer.first_slot)
        return frozen.target_logits(prefix.vectors, [[*renderer.render_prompt(MESSAGES, "start", rows), 0]], [1])[0]


def compute_peft_logits(base, adapted):
    with torch.no_grad():
        return adapted(torch.tensor([build_renderer(base, 8).render_prompt(MESSAGES)])).logits[0, -1]


def test_export_then_import_is_exact(base, tmp_path):
    prefix = create_random_prefix(base)
    imported = import_adapter(export_adapter(prefix, tmp_path / "adapter", base), base, "p")
    assert torch.equal(imported.vectors, prefix.vectors)
    assert imported.salt == prefix.salt
    assert imported.card.position == "start"
    assert load_prefix(save_prefix(imported, tmp_path / "again"), base).card == imported.card


def test_exported_prefix_gives_equal_logits_in_peft(base_and_model, tmp_path):
    base, model = base_and_model
    prefix = create_random_prefix(base)
    expected = compute_next_logits(base, model, prefix)
    adapted = PeftModel.from_pretrained(model, export_adapter(prefix, tmp_path, base))
    assert torch.allclose(compute_peft_logits(base, adapted), expected, atol=1e-4)
    assert not torch.allclose(
        model(torch.tensor([build_renderer(base, 8).render_prompt(MESSAGES)])).logits[0, -1], expected, atol=0.1
    )


@pytest.mark.parametrize("config_class", [PromptTuningConfig, PromptEncoderConfig])
def test_imported_adapter_gives_equal_logits(base_and_model, tmp_path, config_class):
    base, model = base_and_model
    torch.manual_seed(2)
    adapted = get_peft_model(model, config_class(task_type="CAUSAL_LM", num_virtual_tokens=3))
    adapted.eval().save_pretrained(tmp_path)
    prefix = import_adapter(tmp_path, base, "theirs")
    assert prefix.card.num_virtual_tokens == 3
    assert prefix.card.method["base_model_name_or_path"] == str(base.path)
    assert torch.allclose(compute_peft_logits(base, adapted), compute_next_logits(base, model, prefix), atol=1e-4)


def test_embedding_scale_is_applied_both_ways(tmp_path):
    base = tiny_models.make_base_model(SCALED, tmp_path / "model")
    prefix = create_random_prefix(base)
    adapter = export_adapter(prefix, tmp_path / "adapter", base)
    assert torch.equal(load_file(adapter / "adapter_model.safetensors")["prompt_embeddings"], prefix.vectors * 8)
    assert torch.equal(import_adapter(adapter, base, "p").vectors, prefix.vectors)


def test_export_rejects_other_positions(peft_base, tmp_path):
    with pytest.raises(UsageError, match="has position system; PEFT knows only the start"):
        export_adapter(create_random_prefix(peft_base, position="system"), tmp_path / "a", peft_base)


def test_export_rejects_other_base_model(peft_base, tmp_path):
    with pytest.raises(ArtifactError, match="Train it again"):
        export_adapter(create_random_prefix(peft_base), tmp_path / "b", replace(peft_base, fingerprint="0" * 16))


def test_rejects_prompts_with_bos_token(peft_base, tmp_path):
    llama = tiny_models.make_base_model(tiny_models.FAMILIES["llama"], tmp_path / "llama")
    with pytest.raises(UsageError, match="begin with a BOS token: PEFT puts vectors before it"):
        export_adapter(create_random_prefix(llama), tmp_path / "c", llama)
    with pytest.raises(UsageError, match="begin with a BOS token"):
        import_adapter(export_adapter(create_random_prefix(peft_base), tmp_path / "d", peft_base), llama, "p")


def _write_tensors(folder, **tensors):
    save_file(tensors, folder / "adapter_model.safetensors")


def _modify_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _pickle_weights(folder):
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"prompt_embeddings": torch.zeros(2, 64)}, folder / "adapter_model.bin")


DAMAGES = {
    "NaN": (lambda f: _write_tensors(f, prompt_embeddings=torch.full((2, 64), float("nan"))), "NaN or infinity"),
    "wrong width": (lambda f: _write_tensors(f, prompt_embeddings=torch.zeros(2, 32)), "has width 32; base model small has 64"),
    "too many rows": (lambda f: _write_tensors(f, prompt_embeddings=torch.zeros(65, 64)), "1 to 64"),
    "no rows": (lambda f: _write_tensors(f, prompt_embeddings=torch.zeros(0, 64)), "1 to 64"),
    "one dimension": (lambda f: _write_tensors(f, prompt_embeddings=torch.zeros(64)), "must be numbers [k, d]"),
    "whole numbers": (
        lambda f: _write_tensors(f, prompt_embeddings=torch.zeros(2, 64, dtype=torch.int8)),
        "must be numbers [k, d]",
    ),
    "other tensor": (lambda f: _write_tensors(f, lora_A=torch.zeros(2, 64)), "one tensor named prompt_embeddings"),
    "a head too": (lambda f: _write_tensors(f, prompt_embeddings=torch.zeros(2, 64), head=torch.zeros(1)), "one tensor named"),
    "truncated": (
        lambda f: (f / "adapter_model.safetensors").write_bytes((f / "adapter_model.safetensors").read_bytes()[:-9]),
        "not a whole safetensors",
    ),
    "pickle by that name": (
        lambda f: (f / "adapter_model.safetensors").write_bytes(pickle.dumps([1])),
        "not a whole safetensors",
    ),
    "pickled": (_pickle_weights, "is a pickle"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "has no adapter_config.json"),
    "config is not JSON": (lambda f: (f / "adapter_config.json").write_text("{"), "not readable JSON"),
    "config is a list": (lambda f: (f / "adapter_config.json").write_text("[]"), "not the config of an adapter"),
    "LoRA": (lambda f: _modify_config(f, peft_type="LORA"), "peft_type 'LORA' is not supported"),
    "encoder and decoder": (lambda f: _modify_config(f, task_type="SEQ_2_SEQ_LM"), "is not a causal language model"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_rejects_damaged_adapter_in_one_line(peft_base, tmp_path, name):
    damage, expected = DAMAGES[name]
    folder = export_adapter(create_random_prefix(peft_base), tmp_path / "adapter", peft_base)
    damage(folder)
    with pytest.raises(ArtifactError) as error:
        import_adapter(folder, peft_base, "p")
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_import_converts_half_precision(peft_base, tmp_path):
    folder = export_adapter(create_random_prefix(peft_base), tmp_path / "adapter", peft_base)
    _write_tensors(folder, prompt_embeddings=create_random_prefix(peft_base).vectors.bfloat16())
    assert torch.equal(
        import_adapter(folder, peft_base, "p").vectors, create_random_prefix(peft_base).vectors.bfloat16().float()
    )


def test_export_and_import_commands(peft_base, tmp_path, capsys):
    prefix, adapter, imported = (str(tmp_path / name) for name in ("mine", "adapter", "again"))
    save_prefix(create_random_prefix(peft_base), tmp_path / "mine")
    assert main(["export", prefix, "--out", adapter, "--base", str(peft_base.path)]) == 0
    assert main(["import", adapter, "--name", "again", "--out", imported, "--base", str(peft_base.path)]) == 0
    assert torch.equal(load_prefix(tmp_path / "again", peft_base).vectors, create_random_prefix(peft_base).vectors)
    assert main(["import", prefix, "--name", "again", "--out", imported, "--base", str(peft_base.path)]) == 2
    assert "has no adapter_config.json" in capsys.readouterr().err


def generate_and_compare(frozen, base, prefix, questions):
    """Check that a left-padded batch generates what single requests do, and return its token ids."""
    conversations = [[{"role": "user", "content": q}] for q in questions]
    inputs = build_inputs(frozen.model, base, conversations, prefix)
    assert inputs["attention_mask"][:, -1].all()
    assert not inputs["attention_mask"].all()
    answers = frozen.model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False).tolist()
    for answer, conversation in zip(answers, conversations, strict=True):
        expected = generate_reference(frozen, base, Conversation(conversation, prefix), TOKENS)
        assert answer[: len(expected)] == expected
    return answers


def test_left_padded_batch_equals_single_requests(peft_base):
    frozen = FrozenModel(peft_base.load("fp32"), build_renderer(peft_base, 8).first_slot)
    plain = generate_and_compare(frozen, peft_base, None, QUESTIONS)
    for rows, position in enumerate(POSITIONS, 1):
        steered = generate_and_compare(frozen, peft_base, make_prefix(frozen, peft_base, "p", rows, position, rows), QUESTIONS)
        assert sum(a != b for a, b in zip(steered, plain, strict=True)) > 3


def test_generate_with_default_model(frozen, base, three_prefixes):
    generate_and_compare(frozen, base, three_prefixes[2], QUESTIONS[:2])


def test_build_inputs_rejects_slot_tokens_and_other_base(frozen, base, peft_base):
    with pytest.raises(UsageError, match="slot token"):
        build_inputs(frozen.model, base, [[{"role": "user", "content": "Say <|trimtab_slot_0|>"}]])
    prefix = make_prefix(frozen, base, "one", 1, "user", 1)
    with pytest.raises(UsageError, match="slot token"):
        build_inputs(frozen.model, base, [[{"role": "user", "content": "Say <|trimtab_slot_1|>"}]], prefix)
    with pytest.raises(ArtifactError, match=r"made for base model .* \(width 64, "):
        build_inputs(frozen.model, base, [MESSAGES], create_random_prefix(peft_base))
