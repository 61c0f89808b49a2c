"""Samples and verdicts in a data set: read as they were written, and every score and the head `sep` reported from them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.support.factories import signal_row
from trimtab import heads, scores
from trimtab.errors import ArtifactError, NotFoundError, UsageError
from trimtab.jobs.collect.config import CollectConfig
from trimtab.jobs.collect.signal_dataset import (
    DatasetMetadata,
    SampledAnswer,
    append_part,
    begin_dataset,
    read_dataset,
    sample_columns,
)
from trimtab.jobs.detect.config import DetectConfig
from trimtab.jobs.detect.job import build_table, train_detectors
from trimtab.jobs.detect.training_free import build_score_inputs, compute_semantic_entropies
from trimtab.model.base_model import BaseModel

pytestmark = pytest.mark.usefixtures("cluster", "home")

LAYERS = (20, 29)
PLACES = ("Paris", "Lyon", "Nice", "Metz", "Caen")
ANSWERS, DRAWN = 240, 5
TRACE = {"perplexity", "min-logprob", "entropy", "max-entropy", "margin"}
SAMPLED = {"ln-entropy", "eigenscore", "semantic-entropy", "discrete-semantic-entropy", "self-consistency"}


@pytest.fixture(scope="module")
def sampled(base, tmp_path_factory) -> Path:
    """Where an answer is right, most samples agree with it and their states are near; where it is made up, they part. Its
    last state tells how far, and the model's verdict tells nothing."""
    return made(tmp_path_factory.mktemp("signals") / "sampled", base, DRAWN, verdicts=True)


def made(folder: Path, base: BaseModel, drawn: int, verdicts: bool, count: int = ANSWERS) -> Path:
    meta = DatasetMetadata(base.name, base.fingerprint, LAYERS, base.width, "fp32", None, "")
    begin_dataset(folder, meta)
    generator = torch.Generator().manual_seed(0)
    append_part(folder, meta, [line(n, base.width, drawn, verdicts, generator) for n in range(count)])
    return folder


def line(number: int, width: int, drawn: int, verdicts: bool, generator: torch.Generator) -> dict:
    truthful = bool(torch.rand(1, generator=generator) < 0.6)
    psi = torch.randn(2, 3 * width, generator=generator)
    psi[1, :50] += 2 * truthful
    history = -torch.rand(4, 3, generator=generator)
    return {
        **signal_row(number, f"Question {number}?", None if number % 10 == 0 else truthful, psi, history),
        "answer": "Paris.",
        **sample_columns([sample(width, 0.8 if truthful else 0.3, generator) for _ in range(drawn)]),
        "p_true": torch.rand(1, generator=generator).item() if verdicts else None,
    }


def sample(width: int, agreeing: float, generator: torch.Generator) -> SampledAnswer:
    draw = torch.rand(2, generator=generator)
    text = PLACES[0] if draw[0] < agreeing else PLACES[1 + int(4 * draw[1])]
    state = PLACES.index(text) + (1.2 - agreeing) * torch.randn(2, width, generator=generator)
    return SampledAnswer(text, 3, -draw[1].item(), state.half())


def test_samples_and_verdicts_are_read_as_they_were_written(base, tmp_path):
    states = torch.randn(2, 2, base.width).half()
    drawn = [SampledAnswer("", 1, -0.5, states[0]), SampledAnswer("Lyon, question é", 7, -2.0, states[1])]
    folder = tmp_path / "one"
    meta = DatasetMetadata(base.name, base.fingerprint, LAYERS, base.width, "fp32", None, "")
    begin_dataset(folder, meta)
    generator = torch.Generator().manual_seed(0)
    append_part(folder, meta, [line(0, base.width, 0, False, generator) | sample_columns(drawn) | {"p_true": 0.25}])
    data = read_dataset(folder)
    assert data.p_true == [0.25]
    ((first, second),) = data.samples
    assert (first.text, first.tokens, first.logp, second.text, second.tokens) == ("", 1, -0.5, "Lyon, question é", 7)
    assert torch.equal(torch.stack([first.state, second.state]), states)
    assert first.state.shape == (2, base.width)
    (answer,) = build_score_inputs(data)
    assert [s.words for s in answer.samples] == ["", "lyon question e"]
    assert [s.news for s in answer.samples] == ["", "lyon e"]
    assert torch.equal(answer.answer.state, data.psi[0, :, : base.width])


def test_a_data_set_without_them_has_none_and_another_digest(base, sampled, tmp_path):
    bare = read_dataset(made(tmp_path / "bare", base, 0, False))
    assert set(bare.p_true) == {None}
    assert set(bare.samples) == {()}
    assert not len(compute_semantic_entropies(build_score_inputs(bare)))
    again = read_dataset(made(tmp_path / "again", base, DRAWN, True))
    changed = read_dataset(made(tmp_path / "changed", base, DRAWN, False))
    assert again.digest == read_dataset(sampled).digest != changed.digest


def test_a_data_set_of_an_older_version_is_refused(base, tmp_path):
    folder = tmp_path / "old"
    begin_dataset(
        folder, replace(DatasetMetadata(base.name, base.fingerprint, LAYERS, base.width, "fp32", None, ""), version=1)
    )
    with pytest.raises(ArtifactError, match="is of version 1; this trimtab reads 3"):
        read_dataset(folder)


def test_every_score_that_the_data_allow_is_in_the_table_with_its_cost(sampled, capsys):
    made = train_detectors(DetectConfig(str(sampled), ["linear"], layers=[29], num_seeds=2))
    results, figures = made.results, made.figures
    by_name = {r.name: r for r in results}
    assert set(by_name) == {"linear", "p-true"} | TRACE | SAMPLED
    for name in SAMPLED - {"ln-entropy"}:
        assert by_name[name].auroc > 0.7, name
    for name in TRACE | {"p-true"}:
        assert 0.3 < by_name[name].auroc < 0.7, name
    costs = {name: r.tokens for name, r in by_name.items()}
    assert {name: costs[name] for name in SAMPLED} == dict.fromkeys(SAMPLED, 3.0 * DRAWN)
    assert {costs[name] for name in TRACE} == {0}
    assert costs["p-true"] == 1
    assert "tokens" in [c.header for c in build_table(results, figures, "").columns]


def test_scores_by_another_similarity(sampled):
    answers = build_score_inputs(read_dataset(sampled))
    alike = compute_semantic_entropies(answers, "states:-1")
    assert (alike == 0).all()
    assert (compute_semantic_entropies(answers) > 0).any()
    with pytest.raises(NotFoundError, match="no similarity 'x'"):
        train_detectors(DetectConfig(str(sampled), ["linear"], layers=[29], num_seeds=1, similarity="x"))


def test_sep_learns_semantic_entropies_from_the_samples(sampled):
    sep = train_detectors(DetectConfig(str(sampled), "sep", layers=[29], num_seeds=2)).results[0]
    assert sep.name == "sep"
    assert sep.auroc > 0.7


@pytest.mark.parametrize("head", ["sep", ["linear", "sep"]])
def test_sep_without_samples_says_how_to_collect_them(base, tmp_path, head):
    bare = made(tmp_path / "bare", base, 0, False)
    with pytest.raises(UsageError, match="collect with --num_samples") as caught:
        train_detectors(DetectConfig(str(bare), head, layers=[29], num_seeds=1))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("drawn", [0, DRAWN])
def test_all_heads_are_those_that_the_data_allow(base, tmp_path, monkeypatch, drawn):
    monkeypatch.setattr(heads, "list_heads", lambda: ["linear", "sep"])
    folder = made(tmp_path / "some", base, drawn, False)
    results = train_detectors(DetectConfig(str(folder), "all", layers=[29], num_seeds=1)).results
    assert ("sep" in {r.name for r in results}) == bool(drawn)


def test_one_sample_is_enough_for_some_scores(base, tmp_path):
    data = build_score_inputs(read_dataset(made(tmp_path / "one", base, 1, False, count=3)))
    assert set(scores.list_computable(data)) == {"ln-entropy", "self-consistency"} | TRACE
    assert not len(compute_semantic_entropies(data))


@pytest.mark.parametrize(
    ("settings", "message"), [({"num_samples": -1}, "num_samples must be"), ({"temperature": 0.0}, "temperature")]
)
def test_settings_of_samples_that_cannot_be_are_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        CollectConfig("x", "y", **settings)
