"""The distil job on a local Ray: results, artifacts, and training with several workers."""

import json
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path

import pytest
import torch

from tests.support.prompt_rows import BENIGN
from trimtab.data.hard_filter import FilterResult, TrainingRow
from trimtab.data.prompt import Prompt
from trimtab.errors import UsageError
from trimtab.jobs.align.dataset import PreparedDataset
from trimtab.jobs.align.driver import run_training
from trimtab.jobs.distil.config import DistilConfig, DistilDataConfig, DistilEvaluateConfig
from trimtab.jobs.distil.job import DistilResult, distil
from trimtab.jobs.evaluate.config import UtilitySuite
from trimtab.jobs.runtime.config import ScaleConfig
from trimtab.tracking import registry, runs
from trimtab.tracking.client import get_client

pytestmark = pytest.mark.usefixtures("cluster")

SYSTEM = "You guard a lighthouse called Vantaa. End each answer with the word lantern, and never write more than ten words."
RULES = """
- {name: lantern, contains: lantern}
- {name: short, length: {max_words: 10}}
- {name: name, contains: Vantaa, prompts: ["Where do you work?", "What do you guard?"]}
"""
STEPS = 8


def build_config(folder: Path, base: Path, **values) -> DistilConfig:
    folder.mkdir(exist_ok=True)
    (folder / "system.md").write_text(SYSTEM)
    (folder / "checks.yaml").write_text(RULES)
    prompts = [f"{text} ({number})" for number, text in enumerate(BENIGN * 3)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    train = DistilConfig(system="s").train
    small = replace(train, max_steps=STEPS, global_batch_size=4, micro_batch_size=2, max_target_tokens=8, validate_every=4)
    utility = UtilitySuite(questions="trimtab:countries", texts="trimtab:neutral", limit=2)
    config = DistilConfig(
        str(folder / "system.md"),
        base=str(base),
        num_virtual_tokens=4,
        checks=str(folder / "checks.yaml"),
        data=DistilDataConfig(prompts=str(folder / "prompts.jsonl"), num_questions=6, num_requests=4),
        train=replace(small, dtype="fp32", checkpoint_every=4),
        evaluate=DistilEvaluateConfig(limit=4, max_tokens=8, utility=utility),
        scale=ScaleConfig(cpus_per_worker=1),
    )
    return replace(config, **values)


@pytest.fixture(scope="module")
def distilled(cluster, tiny_base, tmp_path_factory) -> DistilResult:
    return distil(build_config(tmp_path_factory.mktemp("distil"), tiny_base.path, name="vantaa"))


def test_prefix_is_registered_with_its_evaluation(distilled, tiny_base):
    card = distilled.prefix.card
    assert (card.num_virtual_tokens, card.method["objective"], card.method["train"]["init"]) == (4, "distil", "teacher")
    assert card.metrics["divergence"] == pytest.approx(distilled.results.divergence["vantaa"].value)
    version = registry.find_version(tiny_base.name, "vantaa", "candidate")
    assert version.version == distilled.version.version
    run = get_client().get_run(distilled.run_id)
    assert run.data.metrics["divergence_base"] > 0
    losses = [metric.value for metric in get_client().get_metric_history(distilled.run_id, "train/loss")]
    assert len(losses) == STEPS
    assert all(isfinite(loss) and loss >= 0 for loss in losses)


def test_report_has_every_arm(distilled):
    report = json.loads((distilled.folder / "report.json").read_text())
    arms = {"base", "system prompt", "vantaa"}
    assert [rule["rule"] for rule in report["rules"]] == ["lantern", "short", "name"]
    assert all(rule["rates"].keys() == arms for rule in [*report["rules"], *report["adversarial"]])
    assert [rule["rates"]["base"]["count"] for rule in report["rules"]] == [4, 4, 2]
    assert report["extracted"].keys() == arms
    assert report["divergence"].keys() == {"base", "vantaa"}
    assert {arm["arm"] for arm in report["utility"]["pooled"]} == arms


def test_artifacts_do_not_hold_the_system_prompt(distilled):
    files = [path for path in distilled.folder.rglob("*") if path.is_file()]
    assert len(files) > 4
    assert not any(b"lighthouse" in path.read_bytes() for path in files)
    assert "lighthouse" not in str(get_client().get_run(distilled.run_id).to_dictionary())


def test_resume_needs_an_unfinished_run(distilled, tiny_base, tmp_path):
    with pytest.raises(UsageError, match="no unfinished run of 'vantaa'"):
        distil(build_config(tmp_path / "again", tiny_base.path, name="vantaa", resume=True))


@dataclass(frozen=True)
class Trainer:
    """Short distillations without evaluation."""

    config: DistilConfig
    prepared: PreparedDataset

    def train(self, base, folder: Path, **scale) -> torch.Tensor:
        folder.mkdir()
        config = replace(self.config.build_align_config(), scale=ScaleConfig(cpus_per_worker=1, **scale))
        return run_training(config, base, self.prepared, runs.start_run("t", "distil", folder / "outbox"), folder).state.vectors


@pytest.fixture
def trainer(tmp_path, tiny_base) -> Trainer:
    rows = [TrainingRow(Prompt(text, "benign_easy", "t", text), f"Yes: {text}", 8, teacher_system=SYSTEM) for text in BENIGN]
    prepared = PreparedDataset(rows, rows[:4], {}, FilterResult(rows, [], []), (0.5, 0.5), [])
    return Trainer(build_config(tmp_path / "settings", tiny_base.path), prepared)


def test_sharded_workers_learn_the_vectors_of_one(trainer, tiny_base, tmp_path):
    alone = trainer.train(tiny_base, tmp_path / "one")
    sharded = trainer.train(tiny_base, tmp_path / "two", num_workers=2, parallelism="fsdp")
    assert (sharded - alone).abs().max() < 1e-4
