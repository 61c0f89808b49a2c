"""Prefix files: round trip, and rejection of damaged files in one line."""

import json
import pickle
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from trimtab.artifacts.card import PrefixCard, add_checksum
from trimtab.artifacts.prefix import FILE, build_prefix, load_prefix, save_prefix
from trimtab.errors import ArtifactError


@pytest.fixture
def prefix_folder(tmp_path, base):
    prefix = build_prefix(
        torch.randn(2, base.width), PrefixCard("prefix", "p", base.name, base.fingerprint, "system", 0, 0, "")
    )
    return save_prefix(prefix, tmp_path / "p")


def test_saved_prefix_loads_unchanged(prefix_folder, base):
    loaded = load_prefix(prefix_folder, base)
    reloaded = load_prefix(save_prefix(loaded, prefix_folder.parent / "q"), base)
    assert torch.equal(loaded.vectors, reloaded.vectors)
    assert loaded.card == reloaded.card
    assert loaded.salt == reloaded.salt


def _write_vectors(folder, vectors):
    save_file({"vectors": vectors}, folder / FILE)


def _modify_card(folder, **changes):
    path = folder / "card.json"
    path.write_text(json.dumps(add_checksum(json.loads(path.read_text()) | changes)))


def _edit_card(folder, old, new):
    path = folder / "card.json"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def _write_header(folder, header):
    data = json.dumps(header).encode()
    (folder / FILE).write_bytes(len(data).to_bytes(8, "little") + data + bytes(576))


DAMAGES = {
    "NaN": (lambda f: _write_vectors(f, torch.full((2, 576), float("nan"))), "NaN or infinity"),
    "infinity": (lambda f: _write_vectors(f, torch.full((2, 576), float("inf"))), "NaN or infinity"),
    "other vectors": (lambda f: _write_vectors(f, torch.zeros(2, 576)), "digest differs"),
    "wrong width": (lambda f: _write_vectors(f, torch.zeros(2, 500)), "the card says"),
    "too many rows": (lambda f: _write_vectors(f, torch.zeros(65, 576)), "1 to 64"),
    "wrong type": (lambda f: _write_vectors(f, torch.zeros(2, 576, dtype=torch.float16)), "float32"),
    "one dimension": (lambda f: _write_vectors(f, torch.zeros(576)), "float32 [k, d]"),
    "pickled": (lambda f: (f / FILE).write_bytes(pickle.dumps({"vectors": [1.0]})), "not a whole safetensors"),
    "truncated": (lambda f: (f / FILE).write_bytes((f / FILE).read_bytes()[:-9]), "not a whole safetensors"),
    "other tensor": (lambda f: save_file({"x": torch.zeros(1)}, f / FILE), "one tensor named vectors"),
    "no file": (lambda f: (f / FILE).unlink(), "has no prefix.safetensors"),
    "no card": (lambda f: (f / "card.json").unlink(), "has no card.json"),
    "card is not JSON": (lambda f: (f / "card.json").write_text("{"), "not readable JSON"),
    "unknown card version": (lambda f: _modify_card(f, card_version=99), "card version 99"),
    "unknown field": (lambda f: _modify_card(f, surprise=1), "field surprise is invalid"),
    "unknown position": (lambda f: _modify_card(f, position="middle"), "field position is invalid"),
    "shape as text": (
        lambda f: _modify_card(f, num_virtual_tokens="2"),
        "field num_virtual_tokens is invalid: input should be a valid integer",
    ),
    "infinite metric": (lambda f: _modify_card(f, metrics={"compliance": float("inf")}), "field metrics.compliance is invalid"),
    "changed by hand": (lambda f: _edit_card(f, '"system"', '"user"'), "checksum differs"),
    "unknown dtype": (
        lambda f: _write_header(f, {"vectors": {"dtype": "F4", "shape": [2, 576], "data_offsets": [0, 576]}}),
        "not a whole safetensors",
    ),
    "other base": (lambda f: _modify_card(f, fingerprint="0" * 16), "Train it again"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_rejects_damaged_prefix_in_one_line(prefix_folder, base, name):
    damage, expected = DAMAGES[name]
    damage(prefix_folder)
    with pytest.raises(ArtifactError) as error:
        load_prefix(prefix_folder, base)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_rejects_base_model_of_other_width(prefix_folder, base):
    with pytest.raises(ArtifactError, match=r"made for base model .* \(width 576, "):
        load_prefix(prefix_folder, replace(base, width=4096))


def test_errors_survive_pickling():
    error = pickle.loads(pickle.dumps(ArtifactError("one line")))
    assert isinstance(error, ArtifactError)
    assert str(error) == "one line"
