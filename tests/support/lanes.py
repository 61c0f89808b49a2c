"""Pytest plugin that divides the tests of a run between the two processes of pytest-xdist.

One process runs the tests that share one Ray cluster and one server. The other one runs all other tests meanwhile, at a low
priority, on the core that is idle while a service starts.
"""

import os

import pytest
from xdist.scheduler import LoadScopeScheduling

NICENESS = 10
INTEGRATION = "tests/integration/"
# Integration tests with services of their own, which run in the process of the unit tests.
SEPARATE = tuple(f"{INTEGRATION}{path}" for path in ("cli/", "cluster/test_submit.py", "engine/", "tracking/"))
SHARED_FIXTURES = {"cluster", "url"}


def uses_shared_services(nodeid: str) -> bool:
    """Return whether a test, given by its pytest node id, belongs to the process with the shared services."""
    return nodeid.startswith(INTEGRATION) and not nodeid.startswith(SEPARATE)


class LaneScheduling(LoadScopeScheduling):
    """Scheduling that gives all tests with shared services to one process, and the others by file to the free process."""

    def _split_scope(self, nodeid: str) -> str:
        return INTEGRATION if uses_shared_services(nodeid) else nodeid.partition("::")[0]


class _Scheduler:
    """Hook of pytest-xdist, which is registered only if the run uses it."""

    def pytest_xdist_make_scheduler(self, config: pytest.Config, log: object) -> LaneScheduling:
        return LaneScheduling(config, log)


class _Worker:
    """Hooks of a process of pytest-xdist."""

    def __init__(self) -> None:
        self._has_lane = False

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Reject a test that would start a second cluster or server, and lower the priority beside the shared services."""
        shared = SHARED_FIXTURES.intersection(getattr(item, "fixturenames", ()))
        if shared and not uses_shared_services(item.nodeid):
            # An error at collection would end the process, and pytest-xdist would not print its reason.
            pytest.fail(f"{item.nodeid} uses {min(shared)}: its file is not among those with shared services", pytrace=False)
        if not self._has_lane:
            self._has_lane = True
            if not uses_shared_services(item.nodeid):
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
