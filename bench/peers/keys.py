"""API keys of benchmarks."""

import io
from contextlib import redirect_stdout

from trimtab.serve.api_keys import AddConfig, run_keys_add


def add_key(name: str, file: str) -> str:
    """Add an API key that may read the metrics, without printing it; return it."""
    with redirect_stdout(io.StringIO()):
        return run_keys_add(AddConfig(name, file=file, metrics=True))["key"]
