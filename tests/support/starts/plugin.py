"""Pytest plugin that counts the starts of Ray, engines, servers, training runs and MLflow in all processes of a run."""

import importlib.util
import json
import os
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

HOOKS = Path(__file__).parent / "hooks"
COUNTER = pytest.StashKey["StartCounter"]()
KINDS = {"ray": "Ray clusters", "engine": "engines", "server": "servers", "fit": "training runs", "mlflow": "MLflow servers"}


class StartCounter:
    """Starts by test, read from a log that every process of the run appends to."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.by_test: dict[str, list[dict[str, Any]]] = {}
        self._offset = 0

    def assign_new(self, test: str) -> None:
        """Assign the starts since the last call to a test."""
        with self.log.open() as file:
            file.seek(self._offset)
            lines = file.readlines()
            self._offset = file.tell()
        if lines:
            self.by_test.setdefault(test, []).extend(json.loads(line) for line in lines)

    def count(self) -> Counter[str]:
        """Return the number of starts by kind."""
        return Counter(start["kind"] for starts in self.by_test.values() for start in starts)

    def sum_seconds(self) -> Counter[str]:
        """Return the time inside the starts by kind (seconds)."""
        seconds: Counter[str] = Counter()
        for starts in self.by_test.values():
            for start in starts:
                seconds[start["kind"]] += start["seconds"]
        return seconds


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--starts-json", metavar="FILE", help="write the starts of each test to a JSON file")


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        # A worker of pytest-xdist logs its starts into the file of the main process, through its environment.
        return
    descriptor, path = tempfile.mkstemp(prefix="trimtab-starts-")
    os.close(descriptor)
    os.environ["TRIMTAB_TEST_STARTS"] = path
    os.environ["TRIMTAB_TEST_SLOW_STEPS"] = f"{path}-slow"
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HOOKS), os.environ.get("PYTHONPATH")]))
    # Python imports the hooks at the start of a process, and this process has started already.
    spec = importlib.util.spec_from_file_location("start_hooks", HOOKS / "sitecustomize.py")
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    counter = config.stash[COUNTER] = StartCounter(Path(path))
    config.pluginmanager.register(_Assigner(counter))


class _Assigner:
    """Assigns starts after each test that can start a service, and removes the log at the end."""

    def __init__(self, counter: StartCounter) -> None:
        self._counter = counter

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        # Unit tests run beside the others, and start nothing.
        if not nodeid.startswith("tests/unit/"):
            self._counter.assign_new(nodeid)

    def pytest_unconfigure(self) -> None:
        self._counter.log.unlink(missing_ok=True)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    counter = config.stash[COUNTER]
    counter.assign_new("end of the run")
    counts, seconds = counter.count(), counter.sum_seconds()
    summary = ", ".join(f"{counts[kind]} {name} ({seconds[kind]:.0f} s)" for kind, name in KINDS.items() if counts[kind])
    terminalreporter.write_line(f"starts: {summary or 'none'}")
    if path := config.getoption("--starts-json"):
        Path(path).write_text(json.dumps(counter.by_test, indent=1) + "\n")
