"""Key files: their commands, their content and the servers that need one."""

import json
import stat

import pytest

from tests.support.api_keys import create_key
from trimtab.cli.main import main
from trimtab.errors import ArtifactError, NotFoundError, UsageError
from trimtab.serve.api_keys import (
    AddConfig,
    RemoveConfig,
    get_default_path,
    get_required_key_file,
    hash_key,
    read_keys,
    run_keys_add,
    run_keys_remove,
)
from trimtab.serve.config import ServeConfig


@pytest.fixture
def key_file(tmp_path):
    return tmp_path / "keys.json"


def test_key_file_stores_only_hashes(key_file, capsys):
    token = create_key(key_file)
    assert token in capsys.readouterr().out
    assert token not in key_file.read_text()
    assert stat.S_IMODE(key_file.stat().st_mode) == 0o600
    (key,) = read_keys(key_file)
    assert key.digest == hash_key(token)
    assert main(["keys", "list", "--file", str(key_file)]) == 0
    output = capsys.readouterr().out
    assert "alice" in output
    assert key.digest not in output


def test_file_with_a_new_key_is_for_its_owner_only(key_file, tmp_path):
    assert main(["keys", "add", "alice", "--file", str(key_file), "--json", str(tmp_path / "alice.json")]) == 0
    assert json.loads((tmp_path / "alice.json").read_text())["key"].startswith("tt-")
    assert stat.S_IMODE((tmp_path / "alice.json").stat().st_mode) == 0o600


def test_adds_and_removes_key_only_once(key_file):
    create_key(key_file)
    with pytest.raises(UsageError, match="a key named 'alice' already exists"):
        create_key(key_file)
    run_keys_remove(RemoveConfig("alice", file=str(key_file)))
    assert read_keys(key_file) == []
    with pytest.raises(NotFoundError, match="no key 'alice'"):
        run_keys_remove(RemoveConfig("alice", file=str(key_file)))


def test_key_file_is_not_resolved(tmp_path):
    """Kubernetes mounts a Secret as a link to a folder that every change replaces."""
    data = tmp_path / "..2026"
    data.mkdir()
    create_key(data / "keys.json")
    (tmp_path / "keys.json").symlink_to(data / "keys.json")
    assert get_required_key_file(ServeConfig(api_key_file=str(tmp_path / "keys.json"))) == str(tmp_path / "keys.json")


@pytest.mark.parametrize(
    "change",
    [
        {"models": "base:mine*"},
        {"models": None},
        {"models": [1]},
        {"digest": 5},
        {"digest": "é" * 64},
        {"concurrent": "4"},
        {"concurrent": -1},
        {"per_minute": True},
        {"created": "now"},
        {"name": None},
        {"metrics": "no"},
        {"unknown": 1},
    ],
    ids=str,
)
def test_edited_key_file_with_values_of_other_types_is_rejected(key_file, change):
    create_key(key_file)
    (entry,) = json.loads(key_file.read_text())["keys"]
    key_file.write_text(json.dumps({"keys": [entry | change]}))
    with pytest.raises(ArtifactError, match="is not a key file"):
        read_keys(key_file)


def test_rejects_damaged_key_file(key_file):
    key_file.write_text('{"keys": [{"name": "x"}]}')
    with pytest.raises(ArtifactError, match=r"is not a key file\. Create one with trimtab keys add"):
        read_keys(key_file)


def test_rejects_negative_limit():
    with pytest.raises(UsageError, match="limits of at least 0"):
        AddConfig("x", per_minute=-1)


def test_public_host_requires_keys_or_explicit_consent(home):
    with pytest.raises(UsageError, match=r"no API keys in .*\. Create one with trimtab keys add NAME"):
        get_required_key_file(ServeConfig(api_key_file=str(home / "none.json")))
    with pytest.raises(UsageError, match=r"the server on 0\.0\.0\.0 would be open to other machines"):
        get_required_key_file(ServeConfig(host="0.0.0.0"))
    assert get_required_key_file(ServeConfig(host="0.0.0.0", allow_unauthenticated=True)) is None
    assert get_required_key_file(ServeConfig()) is None
    run_keys_add(AddConfig("alice"))
    assert get_required_key_file(ServeConfig()) == str(get_default_path())
