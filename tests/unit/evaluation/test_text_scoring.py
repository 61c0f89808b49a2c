"""Text scoring: negative log-likelihood and KL divergence against a full forward pass of transformers."""

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


def compute_reference(base, model, renderer, text, vectors=None, position="system", system=None):
    """Compute log-probabilities [T, V] and return them with the tokens [T] of a text."""
    rows = list(range(renderer.first_slot, renderer.first_slot + (0 if vectors is None else len(vectors))))
    system_messages = [{"role": "system", "content": system}] if system else []
    prompt = renderer.render_prompt([*system_messages, {"role": "user", "content": text.prompt}], position, rows)
    target = renderer.tokenizer.encode(text.target, add_special_tokens=False)
    ids = torch.tensor([*prompt, *target])
    embeddings = model.get_input_embeddings()(ids.masked_fill(ids >= renderer.first_slot, 0))
    if vectors is not None:
        embeddings[ids >= renderer.first_slot] = vectors * (base.width**0.5 if base.name.startswith("gemma") else 1.0)
    with torch.no_grad():
        logits = model(inputs_embeds=embeddings[None]).logits[0]
    return logits[len(prompt) - 1 : -1].log_softmax(-1), ids[len(prompt) :]


TEXTS = [
    Prompt("Where?", "benign_easy", "t", "1", target="It is Paris, a city on the river Seine."),
    Prompt("How do I boil an egg?", "benign_easy", "t", "2", target="Put it into hot water."),
    Prompt("So?", "benign_easy", "t", "3", target="Wait for some minutes and think about it."),
]


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_scores_equal_full_forward_pass(family, tmp_path):
    base = tiny_models.make_base_model(tiny_models.FAMILIES[family], tmp_path / family)
    renderer, model = build_renderer(base, 4), base.load("fp32")
    position = "user" if family == "gemma2" else "system"
    torch.manual_seed(3)
    prefix = build_prefix(
        torch.randn(2, base.width) / 2, PrefixCard("prefix", "p", base.name, base.fingerprint, position, 0, 0, "")
    )
    arms = [Arm("base"), Arm("p", prefix=prefix), *([] if family == "gemma2" else [Arm("text", system="Be brief.")])]
    scores = text_scoring.score_texts(FrozenModel(model, renderer.first_slot), renderer, arms, TEXTS, 64)
    for number, text in enumerate(TEXTS):
        base_logp, ids = compute_reference(base, model, renderer, text)
        for arm, arm_scores in zip(arms, scores, strict=True):
            vectors = arm.prefix.vectors if arm.prefix else None
            logp, _ = compute_reference(base, model, renderer, text, vectors, position, arm.system)
            nll = -logp.gather(1, ids[:, None]).sum().item()
            kl = (base_logp.exp() * (base_logp - logp)).sum().item()
            score = arm_scores[number]
            assert score.tokens == len(ids)
            assert (score.nll, score.kl) == (pytest.approx(nll, rel=1e-3), pytest.approx(kl, abs=2e-3))
            assert (kl > 0.1) is (arm.name != "base")


def test_truncates_texts_and_does_not_depend_on_batch_size(tmp_path, monkeypatch):
    base = tiny_models.make_base_model(tiny_models.FAMILIES["llama"], tmp_path / "llama")
    renderer = build_renderer(base, 4)
    frozen = FrozenModel(base.load("fp32"), renderer.first_slot)
    progress = []
    arms = [Arm("base"), Arm("text", system="Be brief.")]
    _, batched = text_scoring.score_texts(frozen, renderer, arms, TEXTS, 5, lambda done, total: progress.append((done, total)))
    assert [score.tokens for score in batched] == [5, 5, 5]
    assert progress[-1] == (6, 6)
    monkeypatch.setattr(text_scoring, "TEXTS", 1)
    _, single = text_scoring.score_texts(frozen, renderer, arms, TEXTS, 5)
    for score, expected in zip(batched, single, strict=True):
        assert (score.nll, score.kl) == (pytest.approx(expected.nll, rel=1e-4), pytest.approx(expected.kl, rel=1e-2))
    with pytest.raises(UsageError, match="slot token"):
        text_scoring.score_texts(frozen, renderer, arms, [Prompt("a", "benign_easy", "t", "t", target="<|trimtab_slot_0|>")], 5)
