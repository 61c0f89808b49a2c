"""Environment settings: tracking store, proxies, user name, temporary folder."""

import os
import stat
import subprocess
import sys

import pytest

from trimtab import ray_connection, settings
from trimtab.errors import UsageError
from trimtab.ray_connection import connect_to_ray


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("sqlite:///mlflow.db", "sqlite:///{cwd}/mlflow.db"),
        ("sqlite:///../runs/a b.db", "sqlite:///{parent}/runs/a b.db"),
        ("sqlite:////srv/mlflow.db", "sqlite:////srv/mlflow.db"),
        ("http://tracking:5000", "http://tracking:5000"),
        ("databricks", "databricks"),
        ("postgresql://user@host/db", "postgresql://user@host/db"),
    ],
)
def test_relative_sqlite_store_becomes_absolute(monkeypatch, tmp_path, uri, expected):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    expected = expected.format(cwd=tmp_path, parent=tmp_path.parent)
    assert settings.get_tracking_uri() == expected
    assert settings.prepare_environment()["MLFLOW_TRACKING_URI"] == expected


def test_credentials_of_an_address_are_not_passed_on(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://alice:pass%40word@tracking.example:5000/mlflow")
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "other")
    passed_on = settings.prepare_environment()
    assert passed_on["MLFLOW_TRACKING_URI"] == os.environ["MLFLOW_TRACKING_URI"] == "https://tracking.example:5000/mlflow"
    assert not any("pass" in value for value in passed_on.values())
    assert (os.environ["MLFLOW_TRACKING_USERNAME"], os.environ["MLFLOW_TRACKING_PASSWORD"]) == ("alice", "pass@word")


def test_private_folder_is_for_this_user_only(monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    folder = settings.get_private_folder()
    folder.chmod(0o755)
    assert settings.get_private_folder() == folder
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    folder.rmdir()
    folder.symlink_to(tmp_path)
    with pytest.raises(UsageError, match="belongs to another user"):
        settings.get_private_folder()


@pytest.mark.parametrize("name", ["HTTP_PROXY", "https_proxy", "ALL_PROXY"])
def test_loopback_is_excluded_from_proxies(monkeypatch, name):
    monkeypatch.setenv(name, "http://proxy.example:3128")
    monkeypatch.setenv("NO_PROXY", "intranet.example")
    monkeypatch.delenv("no_proxy", raising=False)
    passed_on = settings.prepare_environment()
    for variable in ("NO_PROXY", "no_proxy"):
        assert os.environ[variable] == passed_on[variable] == "intranet.example,localhost,127.0.0.1,::1"


def test_without_proxy_nothing_is_excluded(monkeypatch):
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    settings.prepare_environment()
    assert "NO_PROXY" not in os.environ


def test_user_without_name_is_a_number(monkeypatch):
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    code = "import getpass, os; from trimtab import settings; os.setuid(54321); print(settings.get_user_name());"
    code += "settings.prepare_environment(); print(getpass.getuser())"
    if os.getuid():
        pytest.skip("needs root to become a user without a name")
    environment = os.environ | {"TRIMTAB_HOME": "/tmp"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["54321", "54321"]


@pytest.mark.parametrize("name", ["TMPDIR", "RAY_TMPDIR"])
def test_rejects_long_temporary_folder(monkeypatch, name):
    monkeypatch.setattr(ray_connection.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray_connection.ray, "init", lambda **options: pytest.fail("Ray must not start"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv(name, "/scratch/batch-system/1355700/" + "x" * 30)
    with pytest.raises(UsageError, match=f"Ray cannot start: {name} has 60 characters"):
        connect_to_ray(None)
