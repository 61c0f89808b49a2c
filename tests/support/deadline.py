"""Pytest plugin that skips the tests for which no time is left, for CI with a time limit."""

import time

import pytest


class _Deadline:
    """Hook of a run with a time limit."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    # Before the fixtures of the test start services.
    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Skip a test that begins too late."""
        if time.monotonic() > self._end:
            pytest.skip("no time left, see --start-within")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--start-within", type=float, metavar="SECONDS", help="skip the tests that have not begun after this time")


def pytest_configure(config: pytest.Config) -> None:
    if (seconds := config.getoption("--start-within")) is not None:
        config.pluginmanager.register(_Deadline(seconds))
