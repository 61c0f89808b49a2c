"""`trimtab evaluate truth`: the report on signal data sets, and its usage errors."""

import csv
import io
import json
import re

import pytest
import torch
from jsonschema import validate

from tests.support.factories import build_signal_row
from tests.unit.evaluation.test_study_page import PageParser, extract_text
from trimtab import settings
from trimtab.cli import main as cli
from trimtab.detection.signal_files import DatasetMetadata, append_part, begin_dataset
from trimtab.errors import ArtifactError, UsageError
from trimtab.evaluation.detection.page import render_page
from trimtab.jobs.detect.report import ABLATIONS, evaluate_detectors, open_sources
from trimtab.jobs.detect.report_config import TruthConfig
from trimtab.tracking.client import get_client, get_experiment_id

pytestmark = pytest.mark.usefixtures("cluster")

LAYERS = (20, 29)
MARKUP_SOURCE = "rivers <img src=x onerror=alert(1)> $x^$"
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

# Scores of token statistics, which every data set has.
TRACE_SCORES = ("perplexity", "min-logprob", "entropy", "max-entropy", "margin")


def write_dataset(folder, base, count=190, layers=LAYERS, truthful=None, source=None, seed=0):
    """Write a data set whose last layer's last state tells the truth, with noise; every 20th answer is unlabeled."""
    meta = DatasetMetadata(base.name, base.fingerprint, layers, base.width, "fp32", None, "")
    begin_dataset(folder, meta)
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number in range(count):
        label = bool(torch.rand(1, generator=generator) < 0.5) if truthful is None else truthful
        psi = torch.randn(len(layers), 3 * base.width, generator=generator)
        psi[-1, :100] += 0.3 * label
        history = torch.randn(4, 3, generator=generator).abs() * torch.tensor([-1.0, 1.0, 1.0]) * (0.8 if label else 1.2)
        row = build_signal_row(number, f"Question {seed} {number}?", None if number % 20 == 0 else label, psi, history)
        rows.append(row | {"source": source or ("capitals" if number % 2 else MARKUP_SOURCE)})
    append_part(folder, meta, rows)
    return str(folder)


@pytest.fixture(scope="module")
def dataset_folders(base, tmp_path_factory):
    root = tmp_path_factory.mktemp("sets")
    return [write_dataset(root / "countries", base), write_dataset(root / "trivia <b>&", base, seed=1)]


@pytest.fixture(scope="module")
def report_folder(dataset_folders, tmp_path_factory):
    """Folder with the report on two small data sets, written by the command line."""
    folder = tmp_path_factory.mktemp("report")
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
    command = [
        "evaluate",
        "truth",
        "--signals",
        *dataset_folders,
        *options,
        "--out",
        str(folder),
        "--json",
        str(folder / "command_output.json"),
    ]
    assert cli.main(command) == 0
    return folder


@pytest.fixture(scope="module")
def detection_report(report_folder):
    return json.loads((report_folder / "report.json").read_text())


def test_report_matches_schema_and_json_option(report_folder, detection_report):
    validate(detection_report, REPORT)
    assert json.loads((report_folder / "command_output.json").read_text()) == detection_report
    assert not list(report_folder.glob(".*.part"))


def test_report_has_every_head_and_score_by_dataset(detection_report):
    assert list(detection_report["sets"]) == ["countries", "trivia <b>&"]
    for entry in detection_report["sets"].values():
        assert {arm["name"] for arm in entry["arms"]} == {"flag", "linear", *TRACE_SCORES}
        linear = entry["arms"][1]
        assert linear["chosen"] == {"layers": [29]}
        assert linear["test"]["auroc"]["low"] < linear["test"]["auroc"]["value"] < linear["test"]["auroc"]["high"]
        assert linear["test"]["auroc"]["value"] > 0.75
        assert linear["test"]["auroc"]["value"] == pytest.approx(sum(seed["auroc"] for seed in linear["seeds"]) / 2)
        assert (entry["answers"], entry["labelled"]) == (190, 180)
        assert {kind["source"] for kind in linear["kinds"]} == {"capitals", MARKUP_SOURCE}


def test_rival_is_the_best_on_validation(detection_report):
    for entry in detection_report["sets"].values():
        rivals = {arm["name"]: arm["validation_auroc"] for arm in entry["arms"] if arm["name"] != "flag"}
        compared = entry["compared"]
        assert compared["rival"] == max(rivals, key=rivals.get)
        by_name = {arm["name"]: arm["test"]["auroc"]["value"] for arm in entry["arms"]}
        assert compared["auroc"]["value"] == pytest.approx(by_name["flag"] - by_name[compared["rival"]])
        assert compared["beats"] == (compared["auroc"]["low"] > 0)


def test_report_has_ablations_labels_and_transfer(detection_report):
    for entry in detection_report["sets"].values():
        assert [arm["name"] for arm in entry["ablations"]] == list(ABLATIONS)
        full_arm = entry["arms"][0]
        for arm in entry["ablations"]:
            assert full_arm["chosen"].items() <= (arm["chosen"] | {"groups": full_arm["chosen"]["groups"]}).items()
            gap = full_arm["test"]["auroc"]["value"] - arm["test"]["auroc"]["value"]
            assert arm["difference"]["value"] == pytest.approx(gap)
        assert [(point["name"], point["share"]) for point in entry["labels"]] == [
            (name, share) for name in ("flag", "linear") for share in (0.3, 1.0)
        ]
    cells = {(cell["name"], cell["learned_on"], cell["tested_on"]): cell for cell in detection_report["transfer"]}
    assert len(cells) == 8
    for name, entry in detection_report["sets"].items():
        for arm in entry["arms"][:2]:
            assert cells[arm["name"], name, name]["auroc"] == arm["test"]["auroc"]
    # Both data sets have the same rule, so that a detector transfers.
    assert cells["linear", "countries", "trivia <b>&"]["auroc"]["value"] > 0.7


def test_page_escapes_text_and_loads_no_external_resources(report_folder, detection_report):
    page = (report_folder / "report.html").read_text()
    assert "<script" not in page
    assert "<img" not in page
    elements = PageParser(page).elements
    assert not {"script", "link", "img", "iframe", "image"} & {tag for tag, _ in elements}
    ids = [attributes["id"] for _, attributes in elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert re.findall(r'<section id="(\w+)"', page) == [
        "results",
        "curves",
        "kinds",
        "labels",
        "ablations",
        "transfer",
        "notes",
    ]
    text = extract_text(page)
    for part in (
        MARKUP_SOURCE,
        "trivia <b>&",
        "no geometry",
        *(entry["compared"]["sentence"] for entry in detection_report["sets"].values()),
    ):
        assert part in text


def test_csv_equals_json(report_folder, detection_report):
    rows = list(csv.DictReader(io.StringIO((report_folder / "report.csv").read_text())))
    keys = [tuple(row[key] for key in ("set", "section", "arm", "of", "measure")) for row in rows]
    assert len(set(keys)) == len(keys)
    by_key = dict(zip(keys, rows, strict=True))
    for name, entry in detection_report["sets"].items():
        for arm in entry["arms"]:
            for measure in ("auroc", "auprc", "fpr95", "aurc"):
                row = by_key[name, "results", arm["name"], "", measure]
                assert float(row["value"]) == pytest.approx(arm["test"][measure]["value"], abs=1e-6)
            assert float(by_key[name, "results", arm["name"], "", "oracle_auroc"]["value"]) == pytest.approx(
                arm["oracle_auroc"], abs=1e-6
            )


def test_run_has_metrics_inputs_and_report(report_folder, detection_report):
    runs = get_client().search_runs([get_experiment_id()], "tags.`trimtab.kind` = 'truth'")
    run = next(candidate for candidate in runs if candidate.info.run_name == "evaluate truth small")
    assert run.info.status == "FINISHED"
    value = detection_report["sets"]["countries"]["arms"][1]["test"]["auroc"]["value"]
    assert run.data.metrics["truth/countries/linear/auroc"] == pytest.approx(value)
    assert {source.dataset.name: source.dataset.digest for source in run.inputs.dataset_inputs} == {
        name: entry["digest"] for name, entry in detection_report["sets"].items()
    }
    paths = {artifact.path for artifact in get_client().list_artifacts(run.info.run_id, "report")}
    assert {"report/report.html", "report/report.json", "report/report.csv", "report/roc-countries.png"} <= paths


def test_omits_sections_without_content(base, tmp_path):
    folder = write_dataset(tmp_path / "one", base, count=120, source="only")
    config = TruthConfig(
        folder, "linear", num_seeds=2, validation_fraction=0.2, label_fractions=[], ablations=False, name="one"
    )
    report = evaluate_detectors(config)
    sections = re.findall(r'<section id="(\w+)"', render_page(report))
    assert sections == ["results", "curves", "notes"]
    # The test parts are small and of one kind, but each must have a result.
    assert report.sets[0].compared.name == "linear"
    assert (settings.get_runs_folder() / "truth-one" / "report.html").exists()


def test_rejects_invalid_datasets_and_settings(base, tmp_path, dataset_folders):
    few = write_dataset(tmp_path / "few", base, count=30)
    with pytest.raises(UsageError, match="few: there are 28 labeled answers; a detector needs 50"):
        evaluate_detectors(TruthConfig(few))
    all_true = write_dataset(tmp_path / "right", base, count=80, truthful=True)
    with pytest.raises(UsageError, match=r"right: seed 0: the .* answers are all of one class"):
        evaluate_detectors(TruthConfig(all_true))
    other = write_dataset(tmp_path / "other", base, count=60, layers=(10,))
    with pytest.raises(UsageError, match=r"other has layers \[10\], the first data set \[20, 29\]"):
        evaluate_detectors(TruthConfig([dataset_folders[0], other]))
    with pytest.raises(ArtifactError, match="trimtab collect"):
        evaluate_detectors(TruthConfig(str(tmp_path)))
    with pytest.raises(UsageError, match="--signals FOLDER"):
        TruthConfig()
    with pytest.raises(UsageError, match=r"label_fractions must be above 0 and below 1, not 1\.5"):
        TruthConfig("x", label_fractions=[1.5])
    with pytest.raises(UsageError, match="is not a valid folder name"):
        TruthConfig("x", name="../x")


def test_datasets_of_the_same_name_are_named_by_path(base, tmp_path):
    folders = [write_dataset(tmp_path / parent / "made", base, count=70, seed=seed) for seed, parent in enumerate("ab")]
    sources = open_sources(TruthConfig(folders, "linear", num_seeds=1, validation_fraction=0.3), base)
    assert [source.name for source in sources] == folders
