"""Temporary environment variables."""

import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager


@contextmanager
def set_variables(values: Mapping[str, str]) -> Generator[None]:
    """Set environment variables of this process while the context is open, and restore their former values afterwards.

    The environment belongs to the whole process: other threads and new child processes see the values, too.

    Args:
        values: values by name of the variable.
    """
    former = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in former.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
