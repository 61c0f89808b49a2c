"""Utility suites: figures from answers and readings, the report of them, and reading itself against transformers."""

import pytest
import torch

from tests.support import tiny_models
from trimtab.artifacts.card import PrefixCard
from trimtab.artifacts.prefix import build_prefix
from trimtab.data.prompt import Prompt
from trimtab.errors import UsageError
from trimtab.evaluation.safety.results import Arm
from trimtab.evaluation.utility import text_scoring
from trimtab.model.chat_template import build_renderer
from trimtab.model.frozen_model import FrozenModel


def by_hand(base, loaded, renderer, text, vectors=None, position="system", system=None):
    """Log-probabilities [T, V] and tokens [T] of a text, from the whole model on embeddings put together here."""
    rows = list(range(renderer.first_slot, renderer.first_slot + (0 if vectors is None else len(vectors))))
    said = [{"role": "system", "content": system}] if system else []
    before = renderer.render_prompt([*said, {"role": "user", "content": text.prompt}], position, rows)
    target = renderer.tokenizer.encode(text.target, add_special_tokens=False)
    ids = torch.tensor([*before, *target])
    embedded = loaded.get_input_embeddings()(ids.masked_fill(ids >= renderer.first_slot, 0))
    if vectors is not None:
        embedded[ids >= renderer.first_slot] = vectors * (base.width**0.5 if base.name.startswith("gemma") else 1.0)
    with torch.no_grad():
        logits = loaded(inputs_embeds=embedded[None]).logits[0]
    return logits[len(before) - 1 : -1].log_softmax(-1), ids[len(before) :]


TEXTS = [
    Prompt("Where?", "benign_easy", "t", "1", target="It is Paris, a city on the river Seine."),
    Prompt("How do I boil an egg?", "benign_easy", "t", "2", target="Put it into hot water."),
    Prompt("So?", "benign_easy", "t", "3", target="Wait for some minutes and think about it."),
]


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_readings_are_those_of_the_whole_model(family, tmp_path):
    base = tiny_models.make(tiny_models.FAMILIES[family], tmp_path / family)
    renderer, loaded = build_renderer(base, 4), base.load("fp32")
    position = "user" if family == "gemma2" else "system"
    torch.manual_seed(3)
    prefix = build_prefix(
        torch.randn(2, base.width) / 2, PrefixCard("prefix", "p", base.name, base.fingerprint, position, 0, 0, "")
    )
    arms = [Arm("base"), Arm("p", prefix=prefix), *([] if family == "gemma2" else [Arm("text", system="Be brief.")])]
    found = text_scoring.score_texts(FrozenModel(loaded, renderer.first_slot), renderer, arms, TEXTS, 64)
    for number, text in enumerate(TEXTS):
        plain, ids = by_hand(base, loaded, renderer, text)
        for one, readings in zip(arms, found, strict=True):
            vectors = one.prefix.vectors if one.prefix else None
            logp, _ = by_hand(base, loaded, renderer, text, vectors, position, one.system)
            nll = -logp.gather(1, ids[:, None]).sum().item()
            kl = (plain.exp() * (plain - logp)).sum().item()
            assert readings[number].tokens == len(ids)
            assert (readings[number].nll, readings[number].kl) == (pytest.approx(nll, rel=1e-3), pytest.approx(kl, abs=2e-3))
            assert (kl > 0.1) is (one.name != "base")


def test_texts_are_cut_and_batches_change_nothing(tmp_path, monkeypatch):
    base = tiny_models.make(tiny_models.FAMILIES["llama"], tmp_path / "llama")
    renderer = build_renderer(base, 4)
    frozen = FrozenModel(base.load("fp32"), renderer.first_slot)
    told = []
    arms = [Arm("base"), Arm("text", system="Be brief.")]
    together = text_scoring.score_texts(frozen, renderer, arms, TEXTS, 5, lambda done, total: told.append((done, total)))
    assert [r.tokens for r in together[1]] == [5, 5, 5]
    assert told[-1] == (6, 6)
    monkeypatch.setattr(text_scoring, "TEXTS", 1)
    alone = text_scoring.score_texts(frozen, renderer, arms, TEXTS, 5)
    for one, other in zip(together[1], alone[1], strict=True):
        assert (one.nll, one.kl) == (pytest.approx(other.nll, rel=1e-4), pytest.approx(other.kl, rel=1e-2))
    with pytest.raises(UsageError, match="slot token"):
        text_scoring.score_texts(frozen, renderer, arms, [Prompt("a", "benign_easy", "t", "t", target="<|trimtab_slot_0|>")], 5)
