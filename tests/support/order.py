"""Pytest plugin that runs the test files in random order, to find tests that depend on others."""

import random
from itertools import groupby

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--order-seed", type=int, metavar="N", help="run folders, and the files of each, in an order drawn from N")


def pytest_report_header(config: pytest.Config) -> str | None:
    seed = config.getoption("--order-seed")
    return None if seed is None else f"files in random order: --order-seed {seed}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Shuffle folders, and files inside their folder, whose files share servers. Tests of a file stay in its order."""
    seed = config.getoption("--order-seed")
    if seed is None:
        return
    files = [list(tests) for _, tests in groupby(items, key=lambda item: item.path)]
    folders = [list(group) for _, group in groupby(files, key=lambda tests: tests[0].path.parent)]
    generator = random.Random(seed)
    generator.shuffle(folders)
    for folder in folders:
        generator.shuffle(folder)
    items[:] = [item for folder in folders for tests in folder for item in tests]
