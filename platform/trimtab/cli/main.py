"""Command line: dispatch of commands, option parsing and error reporting.

A command is a frozen dataclass of settings and a function that takes it. The fields of the dataclass define the options, the
keys of the YAML file (`--config FILE`) and the entries of `--help`. Commands are discovered through the entry-point group
`trimtab.commands`, so that the library does not depend on jobs and servers.
"""

import errno
import json
import os
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
from trimtab.util.termination import INTERRUPTED, convert_sigterm

# Width of help texts in characters if the width of the terminal is unknown.
WIDTH = 118


@dataclass(frozen=True)
class Command:
    """Command of the command line.

    Attributes:
        settings: dataclass of the options. The first line of its docstring describes the command.
        run: function that runs the command, as `module:function`. It is imported when the command runs, takes the settings, and
            returns the content of the `--json` file or None.
    """

    settings: type
    run: str


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: command-line arguments without the program's name; those of the process if None.

    Returns:
        Exit code: 0 success, 1 failure, 2 usage error, 130 after SIGINT, 143 after SIGTERM.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    settings.prepare_environment()
    with convert_sigterm() as converter:
        return converter.get_exit_code(_run_with_errors(words))


def _run_with_errors(arguments: list[str]) -> int:
    """Run one command; report an error in one line and return the exit code, INTERRUPTED for a signal."""
    try:
        return _run(arguments)
    except KeyboardInterrupt:
        print("trimtab: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        return 0
    except Exception as error:
        reported = error if isinstance(error, TrimtabError) else as_no_space_error(error) or _as_file_error(error)
        if reported is None:
            raise
        print(f"trimtab: {reported}", file=sys.stderr)
        return reported.exit_code


def _as_file_error(error: Exception) -> UsageError | None:
    """Convert the error of a file that cannot be read or written to UsageError; return None for other errors."""
    if not isinstance(error, OSError) or not error.filename:
        return None
    message = f"{error.filename}: {error.strerror}"
    if error.errno in (errno.EROFS, errno.EACCES) and Path(error.filename).absolute().is_relative_to(settings.get_home()):
        message += ". Set TRIMTAB_HOME to a folder that trimtab can write to"
    return UsageError(message)


def _run(arguments: list[str]) -> int:
    commands = _find_commands()
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_format_overview(commands))
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"trimtab {version('trimtab')}")
        return 0
    command, parsed, output = _read_arguments(arguments)
    if output and not Path(output).absolute().parent.is_dir():
        raise UsageError(f"--json {output}: there is no folder {Path(output).parent}")
    module, _, function = command.run.partition(":")
    result = getattr(import_module(module), function)(parsed)
    if output and result is not None:
        # For this user only: `keys add` returns an API key.
        with open(output, "w", opener=partial(os.open, mode=0o600)) as file:
            file.write(json.dumps(result, indent=2) + "\n")
    return 0


def check_arguments(arguments: Sequence[str]) -> None:
    """Raise UsageError if the arguments are not a valid command with its options. The command is not run."""
    _read_arguments(list(arguments))


def _find_commands() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group="trimtab.commands")}


def _read_arguments(arguments: list[str]) -> tuple[Command, Any, str | None]:
    """Return a command, its settings and the file for `--json`."""
    commands = _find_commands()
    # `evaluate safety` is one command of two words.
    count = 2 if " ".join(arguments[:2]).replace(" ", "-") in commands else 1
    name = "-".join(arguments[:count])
    if name not in commands:
        raise UsageError(f"no command {arguments[0]!r}; there are: {', '.join(sorted(commands)).replace('-', ' ')}")
    command: Command = commands[name].load()
    return command, *parse_options(command, " ".join(arguments[:count]), arguments[count:])


def parse_options(command: Command, name: str, arguments: list[str]) -> tuple[Any, str | None]:
    """Parse the options of a command.

    Args:
        command: command that the options belong to.
        name: name of the command for messages, such as "evaluate safety".
        arguments: command-line arguments after the name.

    Returns:
        Settings object and the file for `--json`.

    Raises:
        UsageError: if an option or the config file is invalid. The message has one line.
    """
    # Imported lazily, so that `trimtab --help` starts fast.
    from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter

    from trimtab.cli.console import HAS_WIDTH

    formatter: Any = DefaultHelpFormatter if HAS_WIDTH else partial(DefaultHelpFormatter, width=WIDTH)
    about, _, _ = (command.settings.__doc__ or "").partition("\n")
    parser = ArgumentParser(prog=f"trimtab {name}", description=about, exit_on_error=False, formatter_class=formatter)
    parser.add_argument("--config", action="config", help="YAML file with these settings; later options override it")
    parser.add_argument("--json", type=str | None, default=None, metavar="FILE", help="write the result to this file")
    parser.add_class_arguments(command.settings, as_group=False, as_positional=True)
    for flag, following in pairwise([*arguments, ""]):
        if flag.startswith("--config=") or (flag == "--config" and following):
            _check_config_file(Path(flag.partition("=")[2] or following))
    try:
        parsed = parser.parse_args(_expand_options(command.settings, arguments))
        values = parser.instantiate_classes(parsed)
    except ArgumentError as error:
        raise UsageError(f"{name}: {_format_parser_error(error)} (trimtab {name} --help)") from error
    output = values.pop("json", None)
    values.pop("config", None)
    return command.settings(**vars(values)), output


def _check_config_file(path: Path) -> None:
    """Raise UsageError if a config file is invalid. The parser's own message does not name the file."""
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path} cannot be read ({getattr(error, 'strerror', None) or 'not a text file'})") from error
    except yaml.YAMLError as error:
        raise UsageError(f"--config {path} is not valid YAML: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(content, Mapping | None):
        raise UsageError(f"--config {path} must map names of settings to values, such as `name: my-prefix`")


def build_settings(settings_class: type, values: Mapping[str, Any], where: str) -> Any:
    """Build a settings object from values, with the checks of the command line.

    Args:
        settings_class: dataclass of the settings.
        values: values by name; nested settings by nested mappings or by dotted names.
        where: source of the values, for error messages.

    Raises:
        UsageError: if a name or a value is invalid. The message has one line.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(settings_class, as_group=False)
    try:
        parsed = parser.parse_object(_nest_keys(values))
        return settings_class(**vars(parser.instantiate_classes(parsed)))
    except (ArgumentError, TypeError) as error:
        raise UsageError(f"{where}: {_format_parser_error(error)}") from error


def _nest_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    """Convert dotted keys to nested mappings. Later keys override earlier ones."""
    nested: dict[str, Any] = {}
    for key, value in values.items():
        head, _, rest = key.partition(".")
        inner = {rest: value} if rest else value
        if isinstance(inner, Mapping) and isinstance(nested.get(head, {}), dict):
            nested[head] = _nest_keys({**nested.get(head, {}), **inner})
        else:
            nested[head] = inner
    return nested


# Beginning of the text of a type such as `list[Attack] | Literal["all"]`.
UNION = "typing.Union["


def _expand_options(settings_class: type, arguments: list[str]) -> list[str]:
    """Expand the short forms of options to the forms of the parser.

    `--resume` becomes `--resume=true`, `--signals A B` a list, and the arguments after `--` the value of `--command`. The
    parser has no short forms for fields of a dataclass: with `nargs="+"` a list option would reject a single value in YAML.
    """
    end = arguments.index("--") if "--" in arguments else len(arguments)
    types = dict(_list_option_types(settings_class))
    starts = [index for index, word in enumerate(arguments[:end]) if word.startswith("--")]
    expanded: list[str] = []
    for start, stop in pairwise(sorted({0, *starts, end})):
        option, *values = arguments[start:stop]
        kind = types.get(option, "")
        if "bool" in kind and not values:
            expanded.append(f"{option}=true")
        elif kind.removeprefix(UNION).startswith(("list[", "tuple[")) and values:
            expanded += [option, _format_list(values, kind)]
        else:
            expanded += [option, *values]
    return expanded + (["--command", json.dumps(arguments[end + 1 :])] if end < len(arguments) else [])


def _format_list(values: list[str], kind: str) -> str:
    """Format the values of a list option as YAML. One value stays as it is if it is a list, or if the type allows it alone."""
    if len(values) == 1 and (values[0].startswith("[") or kind.endswith("| str") or f"Literal['{values[0]}']" in kind):
        return values[0]
    return json.dumps(values) if "list[str]" in kind else f"[{', '.join(values)}]"


def _list_option_types(settings_class: type, path: str = "--") -> Iterator[tuple[str, str]]:
    """Yield each option, including those of nested settings, with its type as text."""
    for f in fields(settings_class):
        if isinstance(f.type, type) and is_dataclass(f.type):
            yield from _list_option_types(f.type, f"{path}{f.name}.")
        else:
            yield f"{path}{f.name}", str(f.type)


def _format_parser_error(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # For an invalid entry of a list, the parser prints the Python class before the actual message.
    lines = [line for line in lines if not line.startswith("Problem with given class_path")]
    return " ".join(lines[:2])[:300] if lines else type(error).__name__


def _format_overview(commands: dict[str, EntryPoint]) -> str:
    lines = ["usage: trimtab COMMAND [options]      trimtab COMMAND --help", ""]
    lines += [f"  {name.replace('-', ' '):<18} {ABOUT.get(name, entry.value)}" for name, entry in sorted(commands.items())]
    return "\n".join([*lines, "", "docs: README.md and docs/"])


# Repeated from the docstrings of the settings, because importing those of all commands takes seconds. A test compares them.
ABOUT = {
    "align": "train a prefix on a frozen base model, evaluate it and register it",
    "assets": "list models and data sets that can be fetched by name",
    "collect": "store the model's signals on answers or prompts, the training data of detectors",
    "demo": "train, serve and query a prefix, a guard and a detector on this machine in minutes",
    "detect": "train detectors on collected signals, select on validation and report on test data",
    "distil": "compress a long system prompt into a prefix, evaluate it and register it",
    "drift": "compare the signals of live traffic with those that a detector was trained on",
    "evaluate-guard": "measure how often rewrites of prompts change the verdict of a detector of prompts",
    "evaluate-safety": "measure refusal and compliance of the base model, a text prompt and prefixes on any prompt files",
    "evaluate-truth": "evaluate detectors of made-up answers: every head and score on every data set",
    "evaluate-utility": "measure accuracy, perplexity and KL drift of the base model, a text prompt and prefixes",
    "export": "convert a prefix to a PEFT prompt-tuning adapter",
    "feedback-ask": "select stored answers or prompts that are worth a label",
    "feedback-import": "import labels of stored answers and prompts from a file",
    "feedback-list": "list the stored answers and prompts, and their labels",
    "feedback-prompts": "write prompts whose answers were labeled as wrong to a file for trimtab align",
    "filter": "show the rows that the hard filter keeps, without training",
    "gc": "list and remove unreferenced files",
    "import": "convert a PEFT prompt-tuning adapter to a prefix",
    "jobs-list": "list the jobs of a cluster",
    "jobs-logs": "print the log of a job",
    "jobs-stop": "stop a job",
    "judges": "measure judges against human labels, and fit a classifier",
    "keys-add": "create an API key, which is shown once",
    "keys-list": "list the API keys and their limits",
    "keys-remove": "remove an API key",
    "lineage": "trace a response, a version or a run to its data, code and base model",
    "list": "list the prefixes and detectors in the registry",
    "promote": "make a version the champion if it passes the gate",
    "refresh": "retrain a detector on new labels of live traffic, and promote it if it passes the gate and a shadow phase",
    "rollback": "make the previous champion the champion again",
    "serve": "serve a base model and its prefixes over the OpenAI API",
    "show": "print the card of a version",
    "study": "compare training methods of a prefix over several seeds and write one report",
    "submit": "submit a trimtab command to a Ray cluster",
    "sweep": "search settings of `trimtab align` and register the best prefix",
    "sync": "send entries to MLflow that an outage delayed",
    "traffic": "show requests, latency and mean risk of each version of a prefix",
    "ui": "open MLflow's web pages on the store that trimtab uses",
}
