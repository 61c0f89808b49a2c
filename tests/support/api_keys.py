"""API keys of tests."""

from pathlib import Path
from typing import Any

from trimtab.serve.api_keys import AddConfig, run_keys_add


def create_key(key_file: Path, name: str = "alice", **options: Any) -> str:
    """Create a key in a file and return its token."""
    return run_keys_add(AddConfig(name, file=str(key_file), **options))["key"]
