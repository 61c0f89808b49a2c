"""Check of vLLM's model runner at startup: a missing attribute is reported in one line."""

import types

import pytest

from trimtab.engine.vllm_ext.runner import CACHE_ATTRIBUTES, RUNNER_ATTRIBUTES, TABLE_ATTRIBUTES, check_runner
from trimtab.errors import IncompatibleLibraryError

TABLE = "input_batch.block_table"


def build_runner(missing: str = "") -> types.SimpleNamespace:
    """Build a runner with every required attribute but `missing`, a path such as those of the constants."""
    runner = types.SimpleNamespace()
    for path in (*RUNNER_ATTRIBUTES, *CACHE_ATTRIBUTES):
        owner, names = runner, path.split(".")
        for name in names[:-1]:
            if not hasattr(owner, name):
                setattr(owner, name, types.SimpleNamespace())
            owner = getattr(owner, name)
        if path != missing:
            setattr(owner, names[-1], None)
    if missing != TABLE:
        runner.input_batch.block_table = [
            types.SimpleNamespace(**{name: None for name in TABLE_ATTRIBUTES if f"{TABLE}.{name}" != missing})
        ]
    return runner


def test_runner_with_all_attributes_passes():
    check_runner(build_runner())
    check_runner(build_runner(), allocated=True)


@pytest.mark.parametrize("path", [*RUNNER_ATTRIBUTES, *CACHE_ATTRIBUTES])
def test_missing_attribute_is_reported_in_one_line(path):
    with pytest.raises(
        IncompatibleLibraryError,
        match=rf"^model runner: SimpleNamespace\.{path} of vllm [0-9.]+ does not exist\. Install vllm 0\.29\.0$",
    ):
        check_runner(build_runner(path), allocated=True)


@pytest.mark.parametrize("name", TABLE_ATTRIBUTES)
def test_missing_block_table_attribute_is_reported_in_one_line(name):
    with pytest.raises(IncompatibleLibraryError, match=rf"^model runner: SimpleNamespace\.{name} of vllm .* does not exist\."):
        check_runner(build_runner(f"{TABLE}.{name}"), allocated=True)


@pytest.mark.parametrize("path", CACHE_ATTRIBUTES)
def test_cache_attributes_are_checked_only_after_allocation(path):
    check_runner(build_runner(path))
