"""The command line. A command is a frozen dataclass of settings and a function that takes it.

The fields of the dataclass are at once the options, the keys of the YAML (`--config FILE`) and the lines of `--help`.
Commands are found through the entry-point group `trimtab.commands`, so that the library knows nothing of jobs and servers.
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points, version
from itertools import pairwise
from pathlib import Path
from typing import Any

from trimtab import settings
from trimtab.errors import TrimtabError, UsageError, as_no_space_error

# How wide help is where there is no terminal to ask.
WIDTH = 118


@dataclass(frozen=True)
class Command:
    """`settings` is the dataclass of options; `run` names the function, `module:function`, imported only when it is called.
    It gives back what `--json` writes, or None."""

    about: str
    settings: type
    run: str


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    settings.prepare_environment()
    try:
        return _run(given)
    except KeyboardInterrupt:
        print("trimtab: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0
    except Exception as error:
        told = error if isinstance(error, TrimtabError) else as_no_space_error(error) or _as_file_error(error)
        if told is None:
            raise
        print(f"trimtab: {told}", file=sys.stderr)
        return told.exit_code


def _as_file_error(error: Exception) -> UsageError | None:
    """What to say of a file that cannot be read or written; None for other errors."""
    if not isinstance(error, OSError) or not error.filename:
        return None
    return UsageError(f"{error.filename}: {error.strerror}")


def _run(given: list[str]) -> int:
    commands = _find_commands()
    if not given or given[0] in ("-h", "--help", "help"):
        print(_format_overview(commands))
        return 0 if given else 2
    if given[0] == "--version":
        print(f"trimtab {version('trimtab')}")
        return 0
    command, parsed, output = _read_arguments(given)
    if output and not Path(output).absolute().parent.is_dir():
        raise UsageError(f"--json {output}: there is no folder {Path(output).parent}")
    module, _, function = command.run.partition(":")
    result = getattr(import_module(module), function)(parsed)
    if output and result is not None:
        Path(output).write_text(json.dumps(result, indent=2) + "\n")
    return 0


def check_arguments(given: Sequence[str]) -> None:
    """Raise UsageError for words that are no command with its options; nothing is run."""
    _read_arguments(list(given))


def _find_commands() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group="trimtab.commands")}


def _read_arguments(given: list[str]) -> tuple[Command, Any, str | None]:
    """A command, its settings, and the file for `--json`."""
    commands = _find_commands()
    # `evaluate safety` is one command of two words.
    words = 2 if " ".join(given[:2]).replace(" ", "-") in commands else 1
    name = "-".join(given[:words])
    if name not in commands:
        raise UsageError(f"no command {given[0]!r}; there are: {', '.join(sorted(commands)).replace('-', ' ')}")
    command: Command = commands[name].load()
    return command, *parse_options(command, " ".join(given[:words]), given[words:])


def parse_options(command: Command, name: str, given: list[str]) -> tuple[Any, str | None]:
    """The settings object, and the file for `--json`. Raises UsageError in one line."""
    # Not on top: `trimtab --help` is to answer at once.
    from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter

    from trimtab.cli.console import KNOWN

    shown: Any = DefaultHelpFormatter if KNOWN else partial(DefaultHelpFormatter, width=WIDTH)
    parser = ArgumentParser(prog=f"trimtab {name}", description=command.about, exit_on_error=False, formatter_class=shown)
    parser.add_argument("--config", action="config", help="YAML file of these settings; options given after it win")
    parser.add_argument("--json", type=str | None, default=None, metavar="FILE", help="write the result to this file")
    parser.add_class_arguments(command.settings, as_group=False, as_positional=True)
    for flag, following in pairwise([*given, ""]):
        if flag.startswith("--config=") or (flag == "--config" and following):
            _check_config_file(Path(flag.partition("=")[2] or following))
    try:
        parsed = parser.parse_args(_expand_flags(command.settings, given))
        values = parser.instantiate_classes(parsed)
    except ArgumentError as error:
        raise UsageError(f"{name}: {_format_parser_error(error)} (trimtab {name} --help)") from error
    output = values.pop("json", None)
    values.pop("config", None)
    return command.settings(**vars(values)), output


def _check_config_file(path: Path) -> None:
    """Raise UsageError for a file of settings that is none; the parser would not say which."""
    import yaml

    try:
        held = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path} cannot be read ({getattr(error, 'strerror', None) or 'it is no text'})") from error
    except yaml.YAMLError as error:
        raise UsageError(f"--config {path} is no YAML: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(held, Mapping | None):
        raise UsageError(f"--config {path} must hold settings by name, as in: name: mine")


def build_settings(settings_class: type, values: Mapping[str, Any], where: str) -> Any:
    """A settings object from nested or dotted values, checked as the command line's are. Raises UsageError in one line."""
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(settings_class, as_group=False)
    try:
        parsed = parser.parse_object(_nest_keys(values))
        return settings_class(**vars(parser.instantiate_classes(parsed)))
    except (ArgumentError, TypeError) as error:
        raise UsageError(f"{where}: {_format_parser_error(error)}") from error


def _nest_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys as nested mappings; later ones win."""
    nested: dict[str, Any] = {}
    for key, value in values.items():
        head, _, rest = key.partition(".")
        inner = {rest: value} if rest else value
        if isinstance(inner, Mapping) and isinstance(nested.get(head, {}), dict):
            nested[head] = _nest_keys({**nested.get(head, {}), **inner})
        else:
            nested[head] = inner
    return nested


def _expand_flags(settings_class: type, given: list[str]) -> list[str]:
    """`--resume` alone means `--resume true`, `--signals A B` a list, and what comes after `--` the option `command`, as people
    type it."""
    given, whole = given[: given.index("--")] if "--" in given else given, given
    command = ["--command", json.dumps(whole[len(given) + 1 :])] if len(given) < len(whole) else []
    given = [*_find_list_options(settings_class, given), *command]
    switches = {f"--{f.name}" for f in fields(settings_class) if "bool" in str(f.type)}
    following = [*given, "--"][1:]
    return [
        f"{word}=true" if word in switches and after.startswith("--") else word
        for word, after in zip(given, following, strict=True)
    ]


def _find_list_options(settings_class: type, given: list[str]) -> list[str]:
    """Several words after an option that takes several names, as the one list that the parser knows."""
    several = set(_takes_several(settings_class))
    joined: list[str] = []
    at = 0
    while at < len(given):
        word, at = given[at], at + 1
        joined.append(word)
        if word in several:
            end = next((i for i in range(at, len(given)) if given[i].startswith("--")), len(given))
            joined += [json.dumps(given[at:end])] if end - at > 1 else given[at:end]
            at = end
    return joined


def _takes_several(settings_class: type, within: str = "--") -> Iterator[str]:
    """Options that take several names, those of inner settings too."""
    for f in fields(settings_class):
        if isinstance(f.type, type) and is_dataclass(f.type):
            yield from _takes_several(f.type, f"{within}{f.name}.")
        elif "list[str]" in str(f.type):
            yield f"{within}{f.name}"


def _format_parser_error(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # Of a list's entries: the parser names our class before it says what is wrong.
    lines = [line for line in lines if not line.startswith("Problem with given class_path")]
    return " ".join(lines[:2])[:300] if lines else type(error).__name__


def _format_overview(commands: dict[str, EntryPoint]) -> str:
    lines = ["usage: trimtab COMMAND [options]      trimtab COMMAND --help", ""]
    lines += [f"  {name.replace('-', ' '):<18} {ABOUT.get(name, entry.value)}" for name, entry in sorted(commands.items())]
    return "\n".join([*lines, "", "docs: README.md and docs/"])


# Said here too, because asking a command what it is about would import it.
ABOUT = {
    "align": "learn a prefix on a frozen model, judge it, register it",
    "assets": "list what can be fetched by name, with licences and sizes",
    "collect": "answer questions and keep the model's signals, which detectors learn from",
    "demo": "the whole story on this machine in minutes",
    "detect": "train detectors on collected signals; choose on validation, report on test",
    "evaluate-safety": "refusal and compliance of base, text prompt and prefixes on any prompt files",
    "evaluate-truth": "the whole report on detectors: every head and training-free score, with intervals",
    "evaluate-utility": "accuracy, perplexity and KL drift of base, text prompt and prefixes",
    "export": "make a PEFT prompt-tuning adapter of a prefix",
    "filter": "what the hard filter would leave, without training on it",
    "gc": "show and remove what nothing refers to any more",
    "import": "make a prefix of a PEFT prompt-tuning adapter",
    "jobs-list": "jobs of a cluster",
    "jobs-logs": "what a job has said",
    "jobs-stop": "end a job of a cluster",
    "judges": "measure judges against human labels, and fit a classifier",
    "keys-add": "make an API key, which is shown once",
    "keys-list": "who has API keys, and what for",
    "keys-remove": "take an API key away",
    "lineage": "where an answer, a version or a run comes from",
    "list": "prefixes in the registry",
    "promote": "make a version the champion, where it passes the gate",
    "rollback": "give champion back to the version before",
    "serve": "serve the base model and its prefixes over the OpenAI API",
    "show": "one version: its card and figures",
    "submit": "send a command to a Ray cluster",
    "study": "compare ways to learn a prefix over several seeds, in one report",
    "sweep": "search settings of align, and register the prefix of the best",
    "sync": "send what an outage of MLflow kept from being logged",
    "traffic": "what each version of a prefix got of the requests, and how risky its answers were",
    "ui": "open MLflow on the store that trimtab uses",
}
