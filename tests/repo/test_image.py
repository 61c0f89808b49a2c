"""Image and its build context."""

import os
import re
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

import pytest
import yaml

from tests.support import ROOT
from tests.support.manifests import DEPLOY


def test_dockerfile_passes_hadolint():
    hadolint = Path(sys.executable).parent / "hadolint"
    result = subprocess.run([hadolint, DEPLOY / "Dockerfile"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    targets = [line.split() for line in (DEPLOY / "Dockerfile").read_text().splitlines() if line.startswith("FROM")]
    assert [words[3] for words in targets] == ["common", "cpu", "gpu"]
    assert (DEPLOY / "Dockerfile").read_text().count("USER 1000") == 2


WILDCARDS = {"**/": "(.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
# Files that must never be in the image, wherever they are.
SECRETS = [".env", "keys.json", "keys.json.lock"]


def is_in_context(path: str, rules: str) -> bool:
    """Return whether a file is in a build context with these rules of a .dockerignore file.

    The last rule that matches the file or one of its folders decides. A pattern begins at the root of the context, unlike in
    .gitignore. Character classes are not supported.
    """
    included = True
    for rule in rules.splitlines():
        if rule and not rule.startswith("#"):
            parts = re.split(r"(\*\*/|\*\*|\*|\?)", rule.removeprefix("!").strip("/"))
            pattern = re.compile("".join(WILDCARDS.get(part, re.escape(part)) for part in parts))
            if any(pattern.fullmatch(str(part)) for part in (PurePosixPath(path), *PurePosixPath(path).parents)):
                included = rule.startswith("!")
    return included


@pytest.mark.parametrize(
    ("rules", "path", "included"),
    [
        ("*/temp*", "folder/temporary.txt", False),
        ("*/temp*", "folder/sub/temporary.txt", True),
        ("*/*/temp*", "folder/sub/temp", False),
        ("temp?", "tempa/file", False),
        ("temp?", "temp/file", True),
        ("**/*.go", "main.go", False),
        ("**/*.go", "a/b/main.go", False),
        ("*.md\n!README.md", "README.md", True),
        ("*.md\n!README.md", "docs/README.md", True),
        ("*.md\n!README*.md\nREADME-secret.md", "README-secret.md", False),
        ("*\n!a\n**/b", "a/c/d", True),
        ("*\n!a\n**/b", "a/b/c", False),
        ("*\n!a\n**/b", "e/a", False),
    ],
)
def test_dockerignore_rules_have_docker_semantics(rules, path, included):
    """Examples of Docker's documentation, and re-included folders."""
    assert is_in_context(path, rules) is included


def list_context() -> set[str]:
    """List the files of the checkout that are in the build context of the image."""
    rules, files = (DEPLOY / "Dockerfile.dockerignore").read_text(), set[str]()
    for folder, names, members in os.walk(ROOT):
        # The packages in it are too many to list; the rules exclude the whole folder.
        names[:] = [name for name in names if name != ".venv"]
        files |= {(Path(folder) / member).relative_to(ROOT).as_posix() for member in members}
    return {file for file in files if is_in_context(file, rules)}


def list_wheel_files() -> set[str]:
    """List the files that setuptools reads for the wheel."""
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project, tool = config["project"], config["tool"]["setuptools"]
    files = {ROOT / "pyproject.toml", ROOT / project["readme"], *(ROOT / name for name in project["license-files"])}
    for package in tool["packages"]:
        base = max((name for name in tool["package-dir"] if f"{package}.".startswith(f"{name}.")), key=len)
        folder = ROOT / tool["package-dir"][base] / package.removeprefix(base).strip(".").replace(".", "/")
        patterns = ["*.py", *tool["package-data"].get(package, [])]
        found = [set(folder.glob(pattern)) for pattern in patterns]
        assert all(found), f"{package}: a pattern matches no file"
        files.update(*found)
    return {file.relative_to(ROOT).as_posix() for file in files}


def test_build_context_has_all_files_of_the_wheel():
    context = list_context()
    assert list_wheel_files() - context == set()
    copied = re.findall(r"^COPY (\S+)", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    assert set(copied) - {"."} <= context
    assert len(list_wheel_files()) > 200


def test_build_context_has_no_secrets_tests_or_git_files():
    allowed = {"LICENSE", "README.md", "jobs", "locks", "platform", "pyproject.toml", "serve"}
    context = list_context()
    assert {file.partition("/")[0] for file in context} == allowed
    assert [file for file in context if file.endswith((".pyc", *SECRETS))] == []
    rules = (DEPLOY / "Dockerfile.dockerignore").read_text()
    folders = ("", "serve/", "platform/trimtab/data/", "deploy/mlflow/", "tests/")
    absent = [folder + name for folder in folders for name in SECRETS]
    absent += [".git/config", ".venv/pyvenv.cfg", "jobs/__pycache__/commands.pyc", "platform/trimtab.egg-info/PKG-INFO"]
    absent += ["id_ed25519", "credentials.json", "tests/conftest.py", "bench/soak.py", "mlflow.db", "mlruns/0/meta.yaml"]
    assert [path for path in absent if is_in_context(path, rules)] == []


@pytest.mark.parametrize("path", ["deploy/mlflow/.env", "keys.json", "keys.json.lock"])
def test_secrets_in_the_checkout_go_nowhere(path):
    """Neither into a commit, nor into the image, nor to the nodes of a cluster."""
    commits = (ROOT / ".gitignore").read_text().splitlines()
    nodes = yaml.safe_load((ROOT / "cluster.yaml").read_text())["rsync_exclude"]
    for patterns in (commits, nodes):
        assert any(fnmatch(Path(path).name, pattern.removeprefix("**/")) for pattern in patterns)
    assert not is_in_context(path, (DEPLOY / "Dockerfile.dockerignore").read_text())
