"""Command-line options: descriptions, flags, lists and the commands of the demo."""

from importlib.metadata import entry_points

import pytest

from trimtab.cli import demo
from trimtab.cli.demo_config import DemoConfig
from trimtab.cli.main import ABOUT, check_arguments, parse_options

COMMANDS = {entry.name: entry for entry in entry_points(group="trimtab.commands")}


def parse_config(name: str, *arguments: str):
    return parse_options(COMMANDS[name].load(), name, list(arguments))[0]


def test_every_command_has_a_description():
    assert ABOUT.keys() == COMMANDS.keys()


@pytest.mark.parametrize("name", COMMANDS)
def test_description_equals_first_docstring_line_of_settings(name):
    first, *_ = COMMANDS[name].load().settings.__doc__.splitlines()
    assert first == f"{ABOUT[name][0].upper()}{ABOUT[name][1:]}."


def test_help_shows_the_description(capsys):
    with pytest.raises(SystemExit):
        parse_config("jobs-stop", "--help")
    assert "Stop a job." in capsys.readouterr().out.splitlines()


def test_booleans_are_flags_at_any_depth():
    config = parse_config(
        "align", "--resume", "--train.compile", "--data.balance_form", "false", "--train.activation_checkpointing"
    )
    assert config.resume is True
    assert config.train.compile is True
    assert config.train.activation_checkpointing is True
    assert config.data.balance_form is False
    assert parse_config("align", "--resume", "auto", "--train.compile=false").resume == "auto"


def test_lists_accept_several_words_at_any_depth():
    config = parse_config("align", "--data.harmful", "a.csv", "1", "--data.filter_rules", "contamination", "--name", "n")
    assert config.data.harmful == ["a.csv", "1"]
    assert config.data.filter_rules == ["contamination"]
    assert parse_config("align", "--data.harmful", '["a.csv", "b.csv"]').data.harmful == ["a.csv", "b.csv"]
    assert parse_config("align", "--targets.benign_rungs", "greedy", "opening").targets.benign_rungs == ["greedy", "opening"]
    assert parse_config("study", "--seeds", "3", "4").seeds == [3, 4]
    assert parse_config("evaluate-truth", "--signals", "x", "--label_fractions", "0.1", "0.5").label_fractions == [0.1, 0.5]
    assert parse_config("serve", "--engine.layers", "9", "18").engine.layers == (9, 18)
    guard = ("evaluate-guard", "--data", "x", "--detector", "y", "--attacks")
    assert parse_config(*guard, "all").attacks == "all"
    assert parse_config(*guard, "spelling").attacks == ["spelling"]
    assert parse_config(*guard, "spelling", "spacing").attacks == ["spelling", "spacing"]


def test_words_after_double_dash_are_the_command():
    config = parse_config("submit", "--name", "n", "--wait", "--", "align", "--resume", "--name", "m")
    assert config.command == ["align", "--resume", "--name", "m"]
    assert config.wait is True


def test_demo_runs_valid_commands(monkeypatch, tmp_path):
    commands: list[list[str]] = []
    monkeypatch.setattr(demo, "_run_command", lambda arguments: commands.append(list(arguments)))
    (tmp_path / demo.LIVE / "base-1").mkdir(parents=True)

    def start_server(config):
        with demo._run_server(config, tmp_path):
            pass

    steps = (
        demo._run_align,
        lambda config: demo._run_guard(config, 1),
        lambda config: demo._run_detect(config, tmp_path),
        start_server,
        lambda config: demo._run_refresh(config, tmp_path),
    )
    for step in steps:
        # The replaced command writes no result to read.
        with pytest.raises(FileNotFoundError):
            step(DemoConfig())
    assert [words[0] for words in commands] == ["align", "collect", "detect", "collect", "detect", "keys", "refresh"]
    for words in commands:
        check_arguments(words)
