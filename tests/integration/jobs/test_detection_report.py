"""`trimtab evaluate truth`: from collected data sets to the report, and what the report refuses."""

import csv
import io
import json
import re

import pytest
import torch
from jsonschema import validate

from tests.support.factories import signal_row
from tests.unit.evaluation.test_study_page import Reader, words
from trimtab import settings
from trimtab.cli import main as cli
from trimtab.errors import ArtifactError, UsageError
from trimtab.evaluation.detection.page import render_page
from trimtab.jobs.collect.signal_dataset import DatasetMetadata, append_part, begin_dataset
from trimtab.jobs.detect.report import ABLATIONS, evaluate_detectors, open_sources
from trimtab.jobs.detect.report_config import TruthConfig
from trimtab.tracking.client import get_client, get_experiment_id

pytestmark = pytest.mark.usefixtures("cluster")

LAYERS = (20, 29)
FOREIGN = "rivers <img src=x onerror=alert(1)> $x^$"
INTERVAL = {
    "type": "object",
    "required": ["value", "low", "high"],
    "additionalProperties": False,
    "properties": {key: {"type": ["number", "null"]} for key in ("value", "low", "high")},
}
ARM = {
    "type": "object",
    "required": ["name", "learned", "chosen", "validation_auroc", "test", "oracle_auroc", "oracle_gap", "seeds", "kinds"],
    "properties": {
        "test": {
            "type": "object",
            "properties": dict.fromkeys(("auroc", "auprc", "fpr95", "aurc"), INTERVAL),
            "required": ["auroc", "auprc", "fpr95", "aurc", "ece", "ece_raw", "count", "made_up"],
        },
        "oracle_gap": {"type": "number", "minimum": 0},
        "kinds": {"type": "array", "items": {"type": "object", "properties": {"auroc": INTERVAL}}},
        "seeds": {"type": "array", "minItems": 2, "maxItems": 2},
    },
}
REPORT = {
    "type": "object",
    "required": ["schema", "title", "base", "layers", "seeds", "sets", "transfer", "notes"],
    "properties": {
        "schema": {"const": 1},
        "sets": {
            "type": "object",
            "additionalProperties": {
                "type": "object",
                "required": ["digest", "answers", "labelled", "right", "arms", "compared", "ablations", "labels"],
                "properties": {
                    "arms": {"type": "array", "items": ARM},
                    "ablations": {"type": "array", "items": ARM},
                    "labels": {"type": "array", "items": {"required": ["name", "share", "auroc"]}},
                    "compared": {"required": ["name", "rival", "auroc", "beats", "sentence"]},
                },
            },
        },
        "transfer": {"type": "array", "items": {"required": ["name", "learned_on", "tested_on", "auroc", "ece"]}},
    },
}

# Scores of the trace, which every data set has.
TRACED = ("perplexity", "min-logprob", "entropy", "max-entropy", "margin")


def collected(folder, base, count=190, layers=LAYERS, truthful=None, source=None, seed=0):
    """A data set whose last layer's last state tells the truth, with noise; every twentieth answer is unlabelled."""
    meta = DatasetMetadata(base.name, base.fingerprint, layers, base.width, "fp32", None, "")
    begin_dataset(folder, meta)
    generator = torch.Generator().manual_seed(seed)
    lines = []
    for i in range(count):
        right = bool(torch.rand(1, generator=generator) < 0.5) if truthful is None else truthful
        psi = torch.randn(len(layers), 3 * base.width, generator=generator)
        psi[-1, :100] += 0.3 * right
        history = torch.randn(4, 3, generator=generator).abs() * torch.tensor([-1.0, 1.0, 1.0]) * (0.8 if right else 1.2)
        row = signal_row(i, f"Question {seed} {i}?", None if i % 20 == 0 else right, psi, history)
        lines.append(row | {"source": source or ("capitals" if i % 2 else FOREIGN)})
    append_part(folder, meta, lines)
    return str(folder)


@pytest.fixture(scope="module")
def folders(base, tmp_path_factory):
    root = tmp_path_factory.mktemp("sets")
    return [collected(root / "countries", base), collected(root / "trivia <b>&", base, seed=1)]


@pytest.fixture(scope="module")
def written(folders, tmp_path_factory):
    """The whole report on two small data sets, by the command line."""
    out = tmp_path_factory.mktemp("report")
    options = [
        "--head",
        "flag",
        "linear",
        "--num_seeds",
        "2",
        "--validation_fraction",
        "0.2",
        "--label_fractions",
        "[0.3]",
        "--name",
        "small",
    ]
    given = ["evaluate", "truth", "--signals", *folders, *options, "--out", str(out), "--json", str(out / "given.json")]
    assert cli.main(given) == 0
    return out


@pytest.fixture(scope="module")
def report(written):
    return json.loads((written / "report.json").read_text())


def test_the_report_is_of_its_schema_and_what_json_gives(written, report):
    validate(report, REPORT)
    assert json.loads((written / "given.json").read_text()) == report
    assert not list(written.glob(".*.part"))


def test_every_head_and_score_is_measured_on_every_data_set(report):
    assert list(report["sets"]) == ["countries", "trivia <b>&"]
    for entry in report["sets"].values():
        assert {arm["name"] for arm in entry["arms"]} == {"flag", "linear", *TRACED}
        linear = entry["arms"][1]
        assert linear["chosen"] == {"layers": [29]}
        assert linear["test"]["auroc"]["low"] < linear["test"]["auroc"]["value"] < linear["test"]["auroc"]["high"]
        assert linear["test"]["auroc"]["value"] > 0.75
        assert linear["test"]["auroc"]["value"] == pytest.approx(sum(s["auroc"] for s in linear["seeds"]) / 2)
        assert (entry["answers"], entry["labelled"]) == (190, 180)
        assert {kind["source"] for kind in linear["kinds"]} == {"capitals", FOREIGN}


def test_the_rival_is_the_one_that_is_best_on_validation(report):
    for entry in report["sets"].values():
        rivals = {arm["name"]: arm["validation_auroc"] for arm in entry["arms"] if arm["name"] != "flag"}
        compared = entry["compared"]
        assert compared["rival"] == max(rivals, key=rivals.get)
        by_name = {arm["name"]: arm["test"]["auroc"]["value"] for arm in entry["arms"]}
        assert compared["auroc"]["value"] == pytest.approx(by_name["flag"] - by_name[compared["rival"]])
        assert compared["beats"] == (compared["auroc"]["low"] > 0)


def test_ablations_labels_and_transfer_are_there(report):
    for entry in report["sets"].values():
        assert [arm["name"] for arm in entry["ablations"]] == list(ABLATIONS)
        whole = entry["arms"][0]
        for arm in entry["ablations"]:
            assert whole["chosen"].items() <= (arm["chosen"] | {"groups": whole["chosen"]["groups"]}).items()
            gap = whole["test"]["auroc"]["value"] - arm["test"]["auroc"]["value"]
            assert arm["difference"]["value"] == pytest.approx(gap)
        assert [(p["name"], p["share"]) for p in entry["labels"]] == [
            (name, share) for name in ("flag", "linear") for share in (0.3, 1.0)
        ]
    cells = {(c["name"], c["learned_on"], c["tested_on"]): c for c in report["transfer"]}
    assert len(cells) == 8
    for name, entry in report["sets"].items():
        for arm in entry["arms"][:2]:
            assert cells[arm["name"], name, name]["auroc"] == arm["test"]["auroc"]
    # Both were made by the same rule, so what one teaches holds on the other.
    assert cells["linear", "countries", "trivia <b>&"]["auroc"]["value"] > 0.7


def test_the_page_escapes_foreign_text_and_asks_nothing_of_the_outside(written, report):
    shown = (written / "report.html").read_text()
    assert "<script" not in shown
    assert "<img" not in shown
    elements = Reader(shown).elements
    assert not {"script", "link", "img", "iframe", "image"} & {tag for tag, _ in elements}
    ids = [attributes["id"] for _, attributes in elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert re.findall(r'<section id="(\w+)"', shown) == [
        "results",
        "curves",
        "kinds",
        "labels",
        "ablations",
        "transfer",
        "notes",
    ]
    text = words(shown)
    for piece in (FOREIGN, "trivia <b>&", "no geometry", *(e["compared"]["sentence"] for e in report["sets"].values())):
        assert piece in text


def test_csv_has_the_figures_of_the_json(written, report):
    rows = list(csv.DictReader(io.StringIO((written / "report.csv").read_text())))
    keys = [tuple(r[key] for key in ("set", "section", "arm", "of", "measure")) for r in rows]
    assert len(set(keys)) == len(keys)
    by_key = dict(zip(keys, rows, strict=True))
    for name, entry in report["sets"].items():
        for arm in entry["arms"]:
            for measure in ("auroc", "auprc", "fpr95", "aurc"):
                row = by_key[name, "results", arm["name"], "", measure]
                assert float(row["value"]) == pytest.approx(arm["test"][measure]["value"], abs=1e-6)
            assert float(by_key[name, "results", arm["name"], "", "oracle_auroc"]["value"]) == pytest.approx(
                arm["oracle_auroc"], abs=1e-6
            )


def test_the_run_has_the_figures_the_data_and_the_report(written, report):
    found = get_client().search_runs([get_experiment_id()], "tags.`trimtab.kind` = 'truth'")
    run = next(r for r in found if r.info.run_name == "evaluate truth small")
    assert run.info.status == "FINISHED"
    value = report["sets"]["countries"]["arms"][1]["test"]["auroc"]["value"]
    assert run.data.metrics["truth/countries/linear/auroc"] == pytest.approx(value)
    assert {d.dataset.name: d.dataset.digest for d in run.inputs.dataset_inputs} == {
        name: entry["digest"] for name, entry in report["sets"].items()
    }
    kept = {artifact.path for artifact in get_client().list_artifacts(run.info.run_id, "report")}
    assert {"report/report.html", "report/report.json", "report/report.csv", "report/roc-countries.png"} <= kept


def test_one_data_set_of_one_kind_has_no_sections_that_say_nothing(base, tmp_path):
    folder = collected(tmp_path / "one", base, count=120, source="only")
    config = TruthConfig(
        folder, "linear", num_seeds=2, validation_fraction=0.2, label_fractions=[], ablations=False, name="one"
    )
    made = evaluate_detectors(config)
    sections = re.findall(r'<section id="(\w+)"', render_page(made))
    assert sections == ["results", "curves", "notes"]
    # Few different answers of one kind in two test parts, and each has a figure all the same.
    assert made.sets[0].compared.name == "linear"
    assert (settings.get_runs_folder() / "truth-one" / "report.html").exists()


def test_what_cannot_be_reported_on_is_refused_in_one_line_before_any_work(base, tmp_path, folders):
    few = collected(tmp_path / "few", base, count=30)
    with pytest.raises(UsageError, match="few: there are 28 labeled answers; a detector needs 50"):
        evaluate_detectors(TruthConfig(few))
    right = collected(tmp_path / "right", base, count=80, truthful=True)
    with pytest.raises(UsageError, match=r"right: seed 0: the .* answers are all of one class"):
        evaluate_detectors(TruthConfig(right))
    other = collected(tmp_path / "other", base, count=60, layers=(10,))
    with pytest.raises(UsageError, match=r"other has layers \[10\], the first data set \[20, 29\]"):
        evaluate_detectors(TruthConfig([folders[0], other]))
    with pytest.raises(ArtifactError, match="trimtab collect"):
        evaluate_detectors(TruthConfig(str(tmp_path)))
    with pytest.raises(UsageError, match="--signals FOLDER"):
        TruthConfig()
    with pytest.raises(UsageError, match=r"label_fractions must be above 0 and below 1, not 1\.5"):
        TruthConfig("x", label_fractions=[1.5])
    with pytest.raises(UsageError, match="is not a valid folder name"):
        TruthConfig("x", name="../x")


def test_two_data_sets_of_one_name_are_told_apart(base, tmp_path):
    folders = [collected(tmp_path / part / "made", base, count=70, seed=i) for i, part in enumerate("ab")]
    given = open_sources(TruthConfig(folders, "linear", num_seeds=1, validation_fraction=0.3), base)
    assert [source.name for source in given] == folders
