"""Pytest plugin that divides the tests of a run between the two processes of pytest-xdist.

One process runs the integration tests, which share one Ray cluster, engines and a server. The other one runs all other tests
meanwhile, at a low priority, on the core that is idle while a service starts.
"""

import os

import pytest
from xdist.scheduler import LoadScopeScheduling

NICENESS = 10
SERVICES = "tests/integration/"


class LaneScheduling(LoadScopeScheduling):
    """Scheduling that gives all integration tests to one process, and the other tests by file to the process that is free."""

    def _split_scope(self, nodeid: str) -> str:
        return SERVICES if nodeid.startswith(SERVICES) else nodeid.partition("::")[0]


class _Scheduler:
    """Hook of pytest-xdist, which is registered only if the run uses it."""

    def pytest_xdist_make_scheduler(self, config: pytest.Config, log: object) -> LaneScheduling:
        return LaneScheduling(config, log)


class _Worker:
    """Hook of a process of pytest-xdist that lowers its priority unless it runs the integration tests."""

    def __init__(self) -> None:
        self._has_lane = False

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if not self._has_lane:
            self._has_lane = True
            if not item.nodeid.startswith(SERVICES):
                # Not needed by the main process of pytest-xdist, which loads this plugin as well.
                import torch

                os.nice(NICENESS)
                # Threads of two processes on two cores would wait for each other.
                torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        config.pluginmanager.register(_Worker())
    elif config.pluginmanager.hasplugin("xdist"):
        config.pluginmanager.register(_Scheduler())
