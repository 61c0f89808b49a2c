"""What is released: wheel and sdist hold every file of the house, and no other."""

import subprocess
import sys
import zipfile

from tests.support import ROOT

FOLDERS = {"platform/trimtab": "trimtab", "jobs": "trimtab/jobs", "serve": "trimtab/serve"}


def test_the_wheel_made_from_the_sdist_has_every_file_of_the_house_and_no_other(tmp_path):
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == shipped()


def shipped() -> set[str]:
    """Names in the wheel of all files in the three folders."""
    return {
        f"{name}/{path.relative_to(ROOT / folder)}"
        for folder, name in FOLDERS.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
