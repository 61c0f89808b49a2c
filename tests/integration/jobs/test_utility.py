"""Utility suites: questions, texts, cached results, and the command."""

import json

import pytest
import torch

from tests.support import tiny_models
from tests.unit.evaluation.test_text_scoring import TEXTS
from trimtab.artifacts.card import PrefixCard
from trimtab.artifacts.prefix import build_prefix, save_prefix
from trimtab.cli.main import main
from trimtab.errors import UsageError
from trimtab.evaluation.safety.results import Arm
from trimtab.evaluation.utility.text_scoring import TextScore
from trimtab.jobs.evaluate.arm_cache import ArmCache
from trimtab.jobs.evaluate.config import UtilityConfig, UtilitySuite
from trimtab.jobs.evaluate.utility import load_suite


def test_suite_is_loaded_and_checked(tmp_path):
    path = tmp_path / "q.jsonl"
    rows = [{"question": f"{number} + {number}?", "answer": f"so\n#### {2 * number}"} for number in range(30)]
    path.write_text("\n".join(map(json.dumps, rows)))
    suite = load_suite(UtilitySuite(questions=str(path), texts="trimtab:neutral", limit=7), "sums")
    assert (len(suite.questions), len(suite.texts), suite.max_tokens) == (7, 7, 320)
    assert {question.kind for question in suite.questions} == {"numeric"}
    f1_suite = load_suite(UtilitySuite(questions=[str(path), "trimtab:countries"], limit=8, kind="f1", max_tokens=9), "more")
    assert ({question.kind for question in f1_suite.questions}, f1_suite.max_tokens) == ({"f1"}, 9)
    assert [entry["rows"] for entry in suite.inputs("sums")] == [7, 7]
    path.write_text('{"question": "How many?", "answers": "twelve"}')
    with pytest.raises(UsageError, match="'twelve' holds no number"):
        load_suite(UtilitySuite(questions=str(path), kind="numeric"), "sums")
    assert load_suite(UtilitySuite(questions=str(path)), "sums").max_tokens == 32
    with pytest.raises(UsageError, match=r"utility sums: columns may rename answers, .*, not goal"):
        load_suite(UtilitySuite(questions=str(path), columns={"goal": "x"}), "sums")
    for settings in (UtilitySuite, UtilityConfig):
        with pytest.raises(UsageError, match=r"questions .*texts"):
            settings()
    with pytest.raises(UsageError, match="must not be below 0"):
        UtilitySuite(texts="trimtab:neutral", limit=-1)


def test_cache_key_depends_on_arm_texts_length_and_dtype(tmp_path):
    store = ArmCache(tmp_path, "f", TEXTS, 8, "fp32")
    arm = Arm("text", system="Be good.")
    assert store.read_answers(arm) is None
    store.write_answers(arm, ["a", "b", "c"])
    store.write_readings(arm, [TextScore(1, 2.0, 3.0)] * 3)
    assert store.read_answers(Arm("other name", system="Be good.")) == ["a", "b", "c"]
    assert store.read_readings(arm) == [TextScore(1, 2.0, 3.0)] * 3
    others = [
        ArmCache(tmp_path, "f", TEXTS[:1], 8, "fp32"),
        ArmCache(tmp_path, "f", TEXTS, 9, "fp32"),
        ArmCache(tmp_path, "f", TEXTS, 8, "bf16"),
    ]
    assert all(other.read_answers(arm) is None for other in others)
    assert store.read_answers(Arm("base")) is None


@pytest.mark.usefixtures("cluster")
def test_command_scores_texts_without_an_engine(tmp_path, capsys):
    base = tiny_models.make_base_model(tiny_models.FAMILIES["llama"], tmp_path / "llama")
    torch.manual_seed(0)
    card = PrefixCard("prefix", "mine", base.name, base.fingerprint, "system", 0, 0, "")
    save_prefix(build_prefix(torch.randn(1, base.width), card), tmp_path / "mine")
    out, answers = tmp_path / "out.json", tmp_path / "answers.json"
    options = ["--texts", "trimtab:neutral", "--limit", "4", "--max_text_tokens", "16", "--prefix", str(tmp_path / "mine")]
    options += ["--base", str(tmp_path / "llama"), "--dtype", "fp32", "--answers_file", str(answers), "--json", str(out)]
    assert main(["evaluate", "utility", *options]) == 0
    pooled = json.loads(out.read_text())["pooled"]
    assert [arm["arm"] for arm in pooled] == ["base", "text prompt", "mine"]
    assert pooled[0]["kl"]["value"] == 0
    assert pooled[2]["kl"]["value"] > 0.01
    assert [reading["tokens"] for reading in json.loads(answers.read_text())["arms"][2]["texts"]] == [16] * 4
    output = capsys.readouterr().out
    assert "times base" in output
    assert "accuracy" not in output
    assert "\u2026" not in output, "the table must not be truncated"
    assert main(["evaluate", "utility", *options]) == 0
    assert "texts read" not in capsys.readouterr().out, "cached readings must be reused"
