"""JSON artifacts of MLflow runs."""

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from trimtab.tracking.client import get_client, wrap_tracking_errors


def read_json_artifact(run_id: str, name: str) -> Mapping[str, Any]:
    """Read a JSON artifact of a run.

    Args:
        run_id: id of the run.
        name: path of the artifact.

    Returns:
        The object in the file; empty if the run has no such artifact, as that of an imported version.
    """
    client = get_client()
    with wrap_tracking_errors(f"read {name} of run {run_id}"), TemporaryDirectory() as folder:
        if all(file.path != name for file in client.list_artifacts(run_id, name.rpartition("/")[0])):
            return {}
        return json.loads(Path(client.download_artifacts(run_id, name, folder)).read_text())
