"""Contents of the wheel that is built from the sdist."""

import subprocess
import sys
import zipfile

from tests.support import ROOT

FOLDERS = {"platform/trimtab": "trimtab", "jobs": "trimtab/jobs", "serve": "trimtab/serve"}


def test_wheel_from_sdist_contains_exactly_the_package_files(tmp_path):
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    completed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert completed.returncode == 0, completed.stdout + completed.stderr
    (wheel,) = tmp_path.glob("*.whl")
    packaged = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert packaged == list_package_files()


def list_package_files() -> set[str]:
    """Return the names that the files of the three folders must have in the wheel."""
    return {
        f"{name}/{path.relative_to(ROOT / folder)}"
        for folder, name in FOLDERS.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
