"""A disk that fills up while a prefix is learned: a small file system of its own, in a namespace that ends with the job."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.align_runs import OPTIONS, WAIT_SECONDS, first_checkpoint
from tests.support.prompt_rows import prompt_files
from trimtab import settings
from trimtab.tracking.client import get_client

STEPS = 60
NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]
# Twice the same job: on a disk that somebody fills, and when there is room again.
SCRIPT = """
folder=$1; shift
mount -t tmpfs -o size=2m none "$folder" || exit 3
"$@"; echo "first: $?"
rm "$folder/filler"
"$@" --resume; echo "second: $?"
cp -r "$folder" "$folder.kept"
"""


def namespaces() -> bool:
    """Whether this machine lets us mount."""
    if not (shutil.which("unshare") and shutil.which("mount")):
        return False
    tried = subprocess.run([*NAMESPACE, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, check=False)
    return tried.returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not namespaces(), reason="this machine gives no mount namespaces")
def test_a_full_disk_is_one_line_and_the_job_goes_on_when_there_is_room(home, small, tmp_path):
    files = prompt_files(tmp_path)
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
        str(small.path),
        "--scale.max_failures",
        "0",
    ]
    command += [
        "--data.harmful",
        str(files / "harmful.jsonl"),
        "--data.benign",
        str(files / "benign.jsonl"),
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
    there = Path(f"/proc/{process.pid}/root{folder}")
    first_checkpoint(there, process)
    fill(there)
    said, _ = process.communicate(timeout=WAIT_SECONDS)
    first, second = said.split("first: ")
    assert first.splitlines()[-1].startswith("trimtab: the disk is full"), said
    assert "Traceback" not in said
    assert second.startswith("1\n"), said
    assert second.endswith("second: 0\n"), said
    (done,) = Path(f"{folder}.kept").glob("*")
    assert (done / "prefix" / "prefix.safetensors").exists()
    (run,) = get_client().search_runs(
        [e.experiment_id for e in get_client().search_experiments()], "attributes.run_name = 'full'"
    )
    steps = [m.step for m in get_client().get_metric_history(run.info.run_id, "train/loss")]
    assert sorted(steps) == list(range(1, STEPS + 1)), "every step once, none computed again from the beginning"


def fill(folder: Path) -> None:
    """Leave no room there."""
    with (folder / "filler").open("wb", buffering=0) as filler:
        try:
            while filler.write(bytes(1024)):
                pass
        except OSError:
            return
