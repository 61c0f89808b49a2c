"""Fault injection for the tests in `tests/failure`: one changed line of code per area.

python bench/faults.py [--area NAME ...] [--control] [--quick] [--json FILE]

Each fault changes a copy of the repository. The tests of its area must fail there. Without the fault, they pass
(`make test-failures`). A run takes one to three minutes per area.
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
# Exit code of pytest if tests fail.
TESTS_FAILED = 1
PACKAGE_FOLDER = ".linked"
EXCLUDED_NAMES = (".git", ".venv", ".site", ".mutation", "build", "dist", "__pycache__", "*.egg-info")


@dataclass(frozen=True)
class Fault:
    """Fault in one place of the code.

    Attributes:
        file: file to change, relative to the repository.
        line: text to replace, which occurs once in the file.
        replacement: faulty text.
        tests: tests that must fail.
    """

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
        start = time.monotonic()
        detected = detect_fault(FAULTS[area], options.control)
        print(f"{area}: {'detected' if detected else 'not detected'} in {time.monotonic() - start:.0f} s", flush=True)
        line: dict[str, object] = {"name": f"fault is caught: {area}", "value": int(detected), "unit": "yes or no"}
        lines.append(line | {"peer": None, "ratio": None, "goal": 1, "met": detected})
    print(json.dumps(lines, indent=1))
    if options.json:
        Path(options.json).write_text(json.dumps(lines, indent=1) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--area", nargs="+", choices=FAULTS, default=list(FAULTS), help="areas to test")
    parser.add_argument("--control", action="store_true", help="change nothing, to check that the tests pass in a copy")
    parser.add_argument("--quick", action="store_true", help="the first area only")
    parser.add_argument("--json", help="write the figures to this file")
    return parser.parse_args()


def detect_fault(fault: Fault, control: bool) -> bool:
    """Apply a fault to a copy of the repository and return whether its tests fail.

    Args:
        fault: the fault.
        control: whether to run the tests without the fault.

    Raises:
        SystemExit: if the line does not occur exactly once, or if the tests do not run.
    """
    with tempfile.TemporaryDirectory(prefix="trimtab-fault-", ignore_cleanup_errors=True) as name:
        copy = copy_repository(Path(name) / "copy")
        path = copy / fault.file
        text = path.read_text()
        if text.count(fault.line) != 1:
            raise SystemExit(f"{fault.file} has {text.count(fault.line)} occurrences of: {fault.line}")
        if not control:
            path.write_text(text.replace(fault.line, fault.replacement))
        environment = os.environ | {"PYTHONPATH": str(copy / PACKAGE_FOLDER), "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", fault.tests]
        completed = subprocess.run(
            command, cwd=copy, env=environment, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
        )
    if completed.returncode not in (0, TESTS_FAILED):
        raise SystemExit(f"the tests did not run: {completed.stdout[-2000:]}{completed.stderr[-2000:]}")
    return completed.returncode == TESTS_FAILED


def copy_repository(folder: Path) -> Path:
    """Copy the repository to a folder and return the folder.

    The copy has a subfolder `PACKAGE_FOLDER` for PYTHONPATH, in which links join the three source folders to one package.
    """
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*EXCLUDED_NAMES))
    package = folder / PACKAGE_FOLDER / "trimtab"
    package.mkdir(parents=True)
    for entry in [*(folder / "platform" / "trimtab").iterdir(), folder / "jobs", folder / "serve"]:
        (package / entry.name).symlink_to(entry)
    return folder


if __name__ == "__main__":
    main()
