"""Pytest plugin that divides the tests of a run between the processes of pytest-xdist.

`make test` has two processes. One runs the jobs and the other one the server and the engines, each with its own Ray cluster.
The process that is done first continues with the tests that start no service, file by file.
"""

from pathlib import PurePosixPath

import pytest
from xdist.scheduler import LoadScopeScheduling

# Folders of integration tests that run jobs.
JOBS = ("cluster", "jobs")


class LaneScheduling(LoadScopeScheduling):
    """Scheduling that runs all tests of a lane in one process, the largest lanes first."""

    def _split_scope(self, nodeid: str) -> str:
        path = PurePosixPath(nodeid.partition("::")[0])
        if "integration" not in path.parts:
            return str(path)
        return "jobs" if path.parent.name in JOBS else "server"


class _Scheduler:
    """Hook of pytest-xdist, which is registered only if the run uses it."""

    def pytest_xdist_make_scheduler(self, config: pytest.Config, log: object) -> LaneScheduling:
        return LaneScheduling(config, log)


def pytest_configure(config: pytest.Config) -> None:
    if config.pluginmanager.hasplugin("xdist"):
        config.pluginmanager.register(_Scheduler())
