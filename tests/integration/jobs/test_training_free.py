"""Samples and verdicts in signal data sets, and the scores and the head `sep` that use them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.support.factories import build_signal_row
from trimtab import heads, scores
from trimtab.detection.signal_dataset import SampledAnswer, read_dataset, sample_columns
from trimtab.detection.signal_files import DatasetMetadata, append_part, begin_dataset
from trimtab.errors import ArtifactError, NotFoundError, UsageError
from trimtab.jobs.collect.config import CollectConfig
from trimtab.jobs.detect.config import DetectConfig
from trimtab.jobs.detect.job import build_table, train_detectors
from trimtab.jobs.detect.training_free import build_score_inputs, compute_semantic_entropies
from trimtab.model.base_model import BaseModel

pytestmark = pytest.mark.usefixtures("cluster", "home")

LAYERS = (20, 29)
CITIES = ("Paris", "Lyon", "Nice", "Metz", "Caen")
NUM_ANSWERS, NUM_SAMPLES = 240, 5
TRACE_SCORES = {"perplexity", "min-logprob", "entropy", "max-entropy", "margin"}
SAMPLE_SCORES = {"ln-entropy", "eigenscore", "semantic-entropy", "discrete-semantic-entropy", "self-consistency"}


@pytest.fixture(scope="module")
def sampled_folder(base, tmp_path_factory) -> Path:
    """Data set in which most samples of a true answer agree with it and have similar states, and those of a false one differ.
    The model's verdict is random."""
    return write_dataset(tmp_path_factory.mktemp("signals") / "sampled", base, NUM_SAMPLES, verdicts=True)


def write_dataset(folder: Path, base: BaseModel, num_samples: int, verdicts: bool, count: int = NUM_ANSWERS) -> Path:
    meta = DatasetMetadata(base.name, base.fingerprint, LAYERS, base.width, "fp32", None, "")
    begin_dataset(folder, meta)
    generator = torch.Generator().manual_seed(0)
    append_part(folder, meta, [build_row(n, base.width, num_samples, verdicts, generator) for n in range(count)])
    return folder


def build_row(number: int, width: int, num_samples: int, verdicts: bool, generator: torch.Generator) -> dict:
    truthful = bool(torch.rand(1, generator=generator) < 0.6)
    psi = torch.randn(2, 3 * width, generator=generator)
    psi[1, :50] += 2 * truthful
    history = -torch.rand(4, 3, generator=generator)
    return {
        **build_signal_row(number, f"Question {number}?", None if number % 10 == 0 else truthful, psi, history),
        "answer": "Paris.",
        **sample_columns([build_sample(width, 0.8 if truthful else 0.3, generator) for _ in range(num_samples)]),
        "p_true": torch.rand(1, generator=generator).item() if verdicts else None,
    }


def build_sample(width: int, agreement: float, generator: torch.Generator) -> SampledAnswer:
    random = torch.rand(2, generator=generator)
    text = CITIES[0] if random[0] < agreement else CITIES[1 + int(4 * random[1])]
    state = CITIES.index(text) + (1.2 - agreement) * torch.randn(2, width, generator=generator)
    return SampledAnswer(text, 3, -random[1].item(), state.half())


def test_samples_and_verdicts_are_read_as_written(base, tmp_path):
    states = torch.randn(2, 2, base.width).half()
    samples = [SampledAnswer("", 1, -0.5, states[0]), SampledAnswer("Lyon, question é", 7, -2.0, states[1])]
    folder = tmp_path / "one"
    meta = DatasetMetadata(base.name, base.fingerprint, LAYERS, base.width, "fp32", None, "")
    begin_dataset(folder, meta)
    generator = torch.Generator().manual_seed(0)
    append_part(folder, meta, [build_row(0, base.width, 0, False, generator) | sample_columns(samples) | {"p_true": 0.25}])
    data = read_dataset(folder)
    assert data.p_true == [0.25]
    ((first, second),) = data.samples
    assert (first.text, first.tokens, first.logp, second.text, second.tokens) == ("", 1, -0.5, "Lyon, question é", 7)
    assert torch.equal(torch.stack([first.state, second.state]), states)
    assert first.state.shape == (2, base.width)
    (answer,) = build_score_inputs(data)
    assert [sample.words for sample in answer.samples] == ["", "lyon question e"]
    assert [sample.news for sample in answer.samples] == ["", "lyon e"]
    assert torch.equal(answer.answer.state, data.psi[0, :, : base.width])


def test_dataset_without_samples_has_another_digest(base, sampled_folder, tmp_path):
    dataset = read_dataset(write_dataset(tmp_path / "bare", base, 0, False))
    assert set(dataset.p_true) == {None}
    assert set(dataset.samples) == {()}
    assert not len(compute_semantic_entropies(build_score_inputs(dataset)))
    equal = read_dataset(write_dataset(tmp_path / "again", base, NUM_SAMPLES, True))
    changed = read_dataset(write_dataset(tmp_path / "changed", base, NUM_SAMPLES, False))
    assert equal.digest == read_dataset(sampled_folder).digest != changed.digest


def test_rejects_dataset_of_an_older_version(base, tmp_path):
    folder = tmp_path / "old"
    begin_dataset(
        folder, replace(DatasetMetadata(base.name, base.fingerprint, LAYERS, base.width, "fp32", None, ""), version=1)
    )
    with pytest.raises(ArtifactError, match="is of version 1; this trimtab reads 3"):
        read_dataset(folder)


def test_table_has_every_computable_score_with_its_cost(sampled_folder, capsys):
    report = train_detectors(DetectConfig(str(sampled_folder), ["linear"], layers=[29], num_seeds=2))
    results, figures = report.results, report.figures
    by_name = {result.name: result for result in results}
    assert set(by_name) == {"linear", "p-true"} | TRACE_SCORES | SAMPLE_SCORES
    for name in SAMPLE_SCORES - {"ln-entropy"}:
        assert by_name[name].auroc > 0.7, name
    for name in TRACE_SCORES | {"p-true"}:
        assert 0.3 < by_name[name].auroc < 0.7, name
    costs = {name: result.tokens for name, result in by_name.items()}
    assert {name: costs[name] for name in SAMPLE_SCORES} == dict.fromkeys(SAMPLE_SCORES, 3.0 * NUM_SAMPLES)
    assert {costs[name] for name in TRACE_SCORES} == {0}
    assert costs["p-true"] == 1
    assert "tokens" in [column.header for column in build_table(results, figures, "").columns]


def test_similarity_is_selected_by_name(sampled_folder):
    answers = build_score_inputs(read_dataset(sampled_folder))
    entropies = compute_semantic_entropies(answers, "states:-1")
    assert (entropies == 0).all()
    assert (compute_semantic_entropies(answers) > 0).any()
    with pytest.raises(NotFoundError, match="no similarity 'x'"):
        train_detectors(DetectConfig(str(sampled_folder), ["linear"], layers=[29], num_seeds=1, similarity="x"))


def test_sep_learns_semantic_entropies(sampled_folder):
    sep = train_detectors(DetectConfig(str(sampled_folder), "sep", layers=[29], num_seeds=2)).results[0]
    assert sep.name == "sep"
    assert sep.auroc > 0.7


@pytest.mark.parametrize("head", ["sep", ["linear", "sep"]])
def test_sep_requires_samples(base, tmp_path, head):
    folder = write_dataset(tmp_path / "bare", base, 0, False)
    with pytest.raises(UsageError, match="collect with --num_samples") as error:
        train_detectors(DetectConfig(str(folder), head, layers=[29], num_seeds=1))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("num_samples", [0, NUM_SAMPLES])
def test_all_selects_the_heads_that_the_data_allow(base, tmp_path, monkeypatch, num_samples):
    monkeypatch.setattr(heads, "list_heads", lambda: ["linear", "sep"])
    folder = write_dataset(tmp_path / "some", base, num_samples, False)
    results = train_detectors(DetectConfig(str(folder), "all", layers=[29], num_seeds=1)).results
    assert ("sep" in {result.name for result in results}) == bool(num_samples)


def test_scores_of_one_sample(base, tmp_path):
    data = build_score_inputs(read_dataset(write_dataset(tmp_path / "one", base, 1, False, count=3)))
    assert set(scores.list_computable(data)) == {"ln-entropy", "self-consistency"} | TRACE_SCORES
    assert not len(compute_semantic_entropies(data))


@pytest.mark.parametrize(
    ("settings", "message"), [({"num_samples": -1}, "num_samples must be"), ({"temperature": 0.0}, "temperature")]
)
def test_rejects_invalid_sample_settings(settings, message):
    with pytest.raises(UsageError, match=message):
        CollectConfig("x", "y", **settings)
