"""Files that release 0.1.0 wrote: each loads, or is rejected with a one-line error."""

import shutil
import sqlite3
from pathlib import Path

import pytest

from tests.support import ROOT
from trimtab.artifacts.prefix import check_base
from trimtab.cli.main import main
from trimtab.detection.detector import load_detector
from trimtab.detection.signal_dataset import read_dataset
from trimtab.judges.refusal_head import load_head
from trimtab.model.base_model import resolve_base_model
from trimtab.tracking import registry

RELEASE = ROOT / "tests" / "fixtures" / "release_0_1_0"


@pytest.fixture
def release_home(home, monkeypatch) -> Path:
    """Working directory and home with the files of release 0.1.0."""
    shutil.copytree(RELEASE, home, dirs_exist_ok=True, ignore=shutil.ignore_patterns("home"))
    shutil.copytree(RELEASE / "home", home, dirs_exist_ok=True)
    for path in (home / "outbox").glob("*.outbox"):
        path.write_text(path.read_text().replace("@HOME@", str(home)))
    dump = home / "mlflow" / "mlflow.sql"
    (home / "mlflow" / "mlflow.db").unlink()
    with sqlite3.connect(home / "mlflow" / "mlflow.db") as database:
        database.executescript(dump.read_text().replace("@HOME@", str(home)))
    database.close()
    monkeypatch.chdir(home)
    return home


@pytest.fixture
def release_base(release_home):
    return resolve_base_model("tiny-llama")


def test_registry_is_read(release_base):
    prefix = registry.find_version(release_base.name, "steer")
    assert (prefix.version, sorted(prefix.aliases)) == (2, ["candidate", "champion"])
    loaded = registry.load_prefix(prefix)
    check_base(loaded, release_base)
    assert loaded.vectors.shape == (2, release_base.width)
    version = registry.find_version(release_base.name, "truth", "candidate")
    assert registry.load_detector(version, release_base).card.name == "truth"


def test_artifacts_are_read(release_home, release_base):
    assert load_detector(release_home / "detector", release_base).card.layers
    assert load_head(release_home / "judge", release_base).weights.shape == (release_base.width + 1,)


def test_signals_are_read(release_home, release_base):
    data = read_dataset(release_home / "signals", release_base)
    assert data.psi.shape == (72, 2, 3 * release_base.width)


def test_rejects_configuration_of_0_1_0(release_home, capsys):
    assert main(["align", "--config", "align.yaml"]) == 2
    assert_one_line(capsys, "does not accept option")


def test_rejects_unfinished_run_of_0_1_0(release_home, capsys):
    """Its settings have other names, so that they cannot be compared with the new ones."""
    data = ["--data.harmful", "harmful.jsonl", "--data.benign", "benign.csv"]
    assert main(["align", "--name", "unfinished", "--base", "tiny-llama", *data, "--resume"]) == 2
    assert_one_line(capsys, "trimtab 0.1.0 started it")


def assert_one_line(capsys, text: str) -> None:
    lines = capsys.readouterr().err.strip().splitlines()
    assert text in lines[-1]
    assert not any("Traceback" in line for line in lines)
