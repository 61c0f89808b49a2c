"""Documentation: commands, configs, figures, links and drawings against the code."""

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
SHELL_OPERATORS = ("&", "|", "||", ">")
# Commands that are quick and change nothing. The test runs them as well.
EXECUTED = ("list", "assets", "sync")


CONFIGS = sorted((ROOT / "jobs" / "configs").glob("*.yaml"))


def list_commands() -> list[tuple[str, list[str]]]:
    """List the arguments of each trimtab command on the pages, with the name of its page."""
    commands: list[tuple[str, list[str]]] = []
    for page in PAGES:
        for block in re.findall(r"```console\n(.*?)```", page.read_text(), re.DOTALL):
            for line in block.splitlines():
                words = shlex.split(line.removeprefix("$ "), comments=True)
                words = list(takewhile(lambda word: word not in SHELL_OPERATORS, words))
                if words and words[0].endswith("trimtab"):
                    commands.append((page.name, words[1:]))
    return commands


@pytest.mark.parametrize(
    ("page", "arguments"), list_commands(), ids=lambda value: " ".join(value) if isinstance(value, list) else value
)
def test_command_in_docs_is_valid(page, arguments, monkeypatch):
    monkeypatch.chdir(ROOT)
    commands = {entry.name: entry for entry in entry_points(group="trimtab.commands")}
    count = 2 if " ".join(arguments[:2]).replace(" ", "-") in commands else 1
    command = commands["-".join(arguments[:count])].load()
    parse_options(command, arguments[0], arguments[count:])
    if arguments[0] in EXECUTED and "--live" not in arguments:
        assert main(arguments) == 0


def test_docs_show_more_than_12_commands():
    assert len(list_commands()) > 12


def test_example_head_in_contributing_passes_its_test(tmp_path):
    head, test = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    # As conftest.py, the head is registered from outside the package.
    (tmp_path / "conftest.py").write_text(head)
    (tmp_path / "test_trace.py").write_text(test)
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", str(tmp_path)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert "1 passed" in result.stdout, result.stdout + result.stderr


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_config_loads(path):
    """The name of a config begins with that of its command."""
    command, *_ = path.stem.split("_")
    commands = {entry.name: entry for entry in entry_points(group="trimtab.commands")}
    # A config file does not name the version to promote, so that the command line must.
    name = ["mine"] if command == "promote" else []
    settings, _ = parse_options(commands[command].load(), command, [*name, "--config", str(path)])
    assert settings.name
    if command == "study":
        assert [build_arm_config(settings, arm).name for arm in settings.arms] == list(settings.arms)
    if command == "sweep":
        assert len(plan_trials(settings, ROOT)) == settings.num_trials


def test_judges_page_has_current_agreement():
    rows = read_human_labels()
    page = (ROOT / "docs" / "judges.md").read_text()
    verdicts = StringMatch().judge_answers([row.prompt for row in rows], [row.answer for row in rows])
    for agreement in compute_label_agreements(verdicts, rows):
        figures = f"{agreement.count} | {agreement.precision} | {agreement.recall} | {agreement.accuracy}"
        assert f"| string match | {figures} |" in page


def test_errors_page_lists_all_errors():
    page = (ROOT / "docs" / "errors.md").read_text()
    for error in vars(errors).values():
        if isinstance(error, type) and issubclass(error, errors.TrimtabError):
            assert f"| `{error.__name__}` | {error.exit_code} | {error.http_status} |" in page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_relative_links_exist(page):
    targets = re.findall(r"\]\((?!http)([^)#]+)", page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_import_drawing_is_up_to_date(tmp_path):
    package = tmp_path / "trimtab"
    package.mkdir()
    for path in [*(ROOT / "platform" / "trimtab").iterdir(), ROOT / "jobs", ROOT / "serve"]:
        (package / path.name).symlink_to(path)
    command = [sys.executable, str(ROOT / "docs" / "arrows.py")]
    result = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=True)
    assert result.stdout == (ROOT / "docs" / "images" / "folders.svg").read_text(), "redraw it as docs/arrows.py describes"
