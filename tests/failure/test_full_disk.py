"""Training on a disk that fills up: a small file system in a mount namespace that ends with the job."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.align_runs import OPTIONS, WAIT_SECONDS, wait_for_checkpoint
from tests.support.commands import can_mount
from tests.support.prompt_rows import write_prompt_files
from trimtab import settings
from trimtab.tracking.client import get_client

STEPS = 60
NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]
# Runs the same job twice: on a disk that the test fills, and after space is freed.
SCRIPT = """
folder=$1; shift
mount -t tmpfs -o size=2m none "$folder" || exit 3
"$@"; echo "first: $?"
rm "$folder/filler"
"$@" --resume; echo "second: $?"
cp -r "$folder" "$folder.copy"
"""


@pytest.mark.slow
@pytest.mark.skipif(not can_mount(NAMESPACE), reason="mount namespaces are not available")
def test_job_reports_full_disk_and_resumes_with_free_space(home, tiny_base, tmp_path):
    data_folder = write_prompt_files(tmp_path)
    folder = settings.get_runs_folder() / "full"
    folder.mkdir(parents=True)
    command = [
        sys.executable,
        "-m",
        "trimtab",
        "align",
        "--name",
        "full",
        "--base",
        str(tiny_base.path),
        "--scale.max_failures",
        "0",
    ]
    command += [
        "--data.harmful",
        str(data_folder / "harmful.jsonl"),
        "--data.benign",
        str(data_folder / "benign.jsonl"),
        *OPTIONS.split(),
        "--train.max_steps",
        str(STEPS),
    ]
    process = subprocess.Popen(
        [*NAMESPACE, "sh", "-c", SCRIPT, "sh", str(folder), *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    mounted_folder = Path(f"/proc/{process.pid}/root{folder}")
    wait_for_checkpoint(mounted_folder, process)
    fill_disk(mounted_folder)
    output, _ = process.communicate(timeout=WAIT_SECONDS)
    first, second = output.split("first: ")
    assert first.splitlines()[-1].startswith("trimtab: the disk is full"), output
    assert "Traceback" not in output
    assert second.startswith("1\n"), output
    assert second.endswith("second: 0\n"), output
    (run_folder,) = Path(f"{folder}.copy").glob("*")
    assert (run_folder / "prefix" / "prefix.safetensors").exists()
    (run,) = get_client().search_runs(
        [experiment.experiment_id for experiment in get_client().search_experiments()], "attributes.run_name = 'full'"
    )
    steps = [m.step for m in get_client().get_metric_history(run.info.run_id, "train/loss")]
    assert sorted(steps) == list(range(1, STEPS + 1)), "each step must be logged exactly once"


def fill_disk(folder: Path) -> None:
    """Write a file until the disk is full."""
    with (folder / "filler").open("wb", buffering=0) as filler:
        try:
            while filler.write(bytes(1024)):
                pass
        except OSError:
            return
