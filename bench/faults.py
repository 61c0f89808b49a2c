"""Faults that only the tests in `tests/failure` catch: one broken line for each of their areas.

python bench/faults.py [--area NAME ...] [--quick] [--json FILE]

Each fault is made in a copy of the repository, in which the test of its area must then fail. Without the fault the tests pass:
`make test-failures`. A run takes one to three minutes per area.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
TIMEOUT_SECONDS = 900
FAILED = 1
LINKED = ".linked"
LEFT_OUT = (".git", ".venv", ".site", ".mutation", "build", "dist", "__pycache__", "*.egg-info")


@dataclass(frozen=True)
class Fault:
    """A line of the code, what replaces it, and the tests that must fail."""

    file: str
    line: str
    replacement: str
    tests: str


TESTS = "tests/failure"
FAULTS = {
    "a killed worker": Fault(
        "jobs/align/state.py",
        '{"first": tensors["first"], "second": tensors["second"]},',
        '{"first": tensors["first"] * 0, "second": tensors["second"]},',
        f"{TESTS}/test_workers.py",
    ),
    "a killed driver": Fault(
        "jobs/align/driver.py",
        'if int(entry["step"]) not in logged',
        "if logged is not None",
        f"{TESTS}/test_nodes.py::test_killed_driver_continues_in_the_same_run",
    ),
    "a full disk": Fault(
        "platform/trimtab/errors.py",
        'if getattr(current, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or message in str(current):',
        'if getattr(current, "errno", None) == errno.EDQUOT:',
        f"{TESTS}/test_full_disk.py",
    ),
    "an outage of the storage": Fault(
        "jobs/align/checkpoints.py",
        "open_folder(config.scale.storage_path, attempts=S3_ATTEMPTS)",
        "open_folder(config.scale.storage_path)",
        f"{TESTS}/test_storage_outage.py",
    ),
    "an outage of MLflow during a job": Fault(
        "platform/trimtab/tracking/runs.py",
        'self._path("rest").touch()\n                break',
        'self._path("rest").touch()',
        f"{TESTS}/test_tracking_outage.py",
    ),
    "an outage of MLflow during serving": Fault(
        "serve/registry/sources.py",
        'self._versions = [_parse_version(entry) for entry in cached["versions"]]',
        "self._versions = []",
        f"{TESTS}/test_mlflow_outage.py::test_serves_cached_versions_during_mlflow_outage",
    ),
    "several replicas": Fault(
        "serve/registry/sources.py",
        "if changed != self._changed or began >= self._next:",
        "if self._changed == UNREAD:",
        f"{TESTS}/test_replicas.py::test_promotion_and_rollback_give_no_wrong_answers",
    ),
    "new nodes on demand": Fault(
        "cluster.yaml",
        "  gpu:\n    min_workers: 0\n    max_workers: 4\n",
        "  gpu:\n    min_workers: 0\n    max_workers: 0\n",
        f"{TESTS}/test_autoscaling.py",
    ),
    "the wheel": Fault(
        "pyproject.toml",
        '"trimtab.evaluation" = ["templates/*.jinja"]',
        '"trimtab.evaluation" = ["templates/page.html.jinja"]',
        f"{TESTS}/test_release.py",
    ),
}


def main() -> None:
    options = parse_arguments()
    lines: list[dict[str, object]] = []
    for area in options.area[: 1 if options.quick else None]:
        began = time.monotonic()
        caught = is_caught(FAULTS[area], options.control)
        print(f"{area}: {'caught' if caught else 'not caught'} in {time.monotonic() - began:.0f} s", flush=True)
        figure: dict[str, object] = {"name": f"fault is caught: {area}", "value": int(caught), "unit": "yes or no"}
        lines.append(figure | {"peer": None, "ratio": None, "goal": 1, "met": caught})
    print(json.dumps(lines, indent=1))
    if options.json:
        Path(options.json).write_text(json.dumps(lines, indent=1) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--area", nargs="+", choices=FAULTS, default=list(FAULTS), help="areas to break")
    parser.add_argument("--control", action="store_true", help="break nothing, to see that the tests pass in a copy")
    parser.add_argument("--quick", action="store_true", help="the first area only")
    parser.add_argument("--json", help="write the figures to this file")
    return parser.parse_args()


def is_caught(fault: Fault, control: bool) -> bool:
    """Break a line in a copy of the repository, unless `control` is set, and return whether the tests of the area fail.

    Raises:
        SystemExit: if the line does not occur exactly once, or if the tests do not run.
    """
    with tempfile.TemporaryDirectory(prefix="trimtab-fault-", ignore_cleanup_errors=True) as name:
        copy = copy_repository(Path(name) / "copy")
        path = copy / fault.file
        text = path.read_text()
        if text.count(fault.line) != 1:
            raise SystemExit(f"{fault.file} has {text.count(fault.line)} times: {fault.line}")
        if not control:
            path.write_text(text.replace(fault.line, fault.replacement))
        environment = os.environ | {"PYTHONPATH": str(copy / LINKED), "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", fault.tests]
        completed = subprocess.run(
            command, cwd=copy, env=environment, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
        )
    if completed.returncode not in (0, FAILED):
        raise SystemExit(f"the tests did not run: {completed.stdout[-2000:]}{completed.stderr[-2000:]}")
    return completed.returncode == FAILED


def copy_repository(folder: Path) -> Path:
    """Copy the repository, with a folder LINKED in which the three folders are one package, for PYTHONPATH; return it."""
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*LEFT_OUT))
    package = folder / LINKED / "trimtab"
    package.mkdir(parents=True)
    for entry in [*(folder / "platform" / "trimtab").iterdir(), folder / "jobs", folder / "serve"]:
        (package / entry.name).symlink_to(entry)
    return folder


if __name__ == "__main__":
    main()
