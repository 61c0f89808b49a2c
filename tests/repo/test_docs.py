"""The documentation: every command it shows is one that the command line takes, and its figures are those of the code."""

import os
import re
import shlex
import subprocess
import sys
from importlib.metadata import entry_points
from itertools import takewhile

import pytest

from tests.support import ROOT
from trimtab import errors
from trimtab.cli.main import main, parse_options
from trimtab.jobs.study.job import build_arm_config
from trimtab.jobs.sweep.job import plan_trials
from trimtab.judges.human_agreement import compute_label_agreements
from trimtab.judges.human_labels import read_human_labels
from trimtab.judges.string_match import StringMatch

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "deploy").rglob("*.md")),
]
SHELL = ("&", "|", "||", ">")
# Quick, and without an effect on what the page is about: these are run as well.
LIGHT = ("list", "assets", "sync")


def commands() -> list[tuple[str, list[str]]]:
    found: list[tuple[str, list[str]]] = []
    for page in PAGES:
        for block in re.findall(r"```console\n(.*?)```", page.read_text(), re.DOTALL):
            for line in block.splitlines():
                words = shlex.split(line.removeprefix("$ "), comments=True)
                words = list(takewhile(lambda word: word not in SHELL, words))
                if words and words[0].endswith("trimtab"):
                    found.append((page.name, words[1:]))
    return found


@pytest.mark.parametrize(("page", "words"), commands(), ids=lambda v: " ".join(v) if isinstance(v, list) else v)
def test_commands_shown_are_commands(page, words, monkeypatch):
    monkeypatch.chdir(ROOT)
    known = {e.name: e for e in entry_points(group="trimtab.commands")}
    count = 2 if " ".join(words[:2]).replace(" ", "-") in known else 1
    command = known["-".join(words[:count])].load()
    parse_options(command, words[0], words[count:])
    if words[0] in LIGHT and "--live" not in words:
        assert main(words) == 0


def test_enough_is_shown():
    assert len(commands()) > 12


def test_the_head_of_contributing_passes_its_test(tmp_path):
    head, test = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    # Registered from outside the package here: it would be found by being there.
    (tmp_path / "conftest.py").write_text(head)
    (tmp_path / "test_trace.py").write_text(test)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", str(tmp_path)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert "1 passed" in done.stdout, done.stdout + done.stderr


def test_every_shipped_config_is_loaded():
    """Each is named after its command."""
    known = {e.name: e for e in entry_points(group="trimtab.commands")}
    for path in sorted((ROOT / "jobs" / "configs").glob("*.yaml")):
        # Which version is to be promoted is no setting to keep in a file.
        name = ["mine"] if path.stem == "promote" else []
        settings, _ = parse_options(known[path.stem].load(), path.stem, [*name, "--config", str(path)])
        assert settings.name
        if path.stem == "study":
            assert [build_arm_config(settings, arm).name for arm in settings.arms] == list(settings.arms)
        if path.stem == "sweep":
            assert len(plan_trials(settings, ROOT)) == settings.num_trials


def test_the_judges_figures_are_those_of_the_page():
    rows = read_human_labels()
    page = (ROOT / "docs" / "judges.md").read_text()
    for a in compute_label_agreements(StringMatch().judge_answers([r.prompt for r in rows], [r.answer for r in rows]), rows):
        assert f"| string match | {a.count} | {a.precision} | {a.recall} | {a.accuracy} |" in page


def test_the_page_of_errors_has_all_of_them():
    page = (ROOT / "docs" / "errors.md").read_text()
    for kind in vars(errors).values():
        if isinstance(kind, type) and issubclass(kind, errors.TrimtabError):
            assert f"| `{kind.__name__}` | {kind.exit_code} | {kind.http_status} |" in page


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_drawing_shows_the_imports(tmp_path):
    package = tmp_path / "trimtab"
    package.mkdir()
    for path in [*(ROOT / "platform" / "trimtab").iterdir(), ROOT / "jobs", ROOT / "serve"]:
        (package / path.name).symlink_to(path)
    command = [sys.executable, str(ROOT / "docs" / "arrows.py")]
    drawn = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=True)
    assert drawn.stdout == (ROOT / "docs" / "images" / "folders.svg").read_text(), "docs/arrows.py says how to draw it again"
