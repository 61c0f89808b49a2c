"""README: the commands and the example on an own model, a local folder, with fewer training steps."""

import re
import shlex
import shutil
import subprocess
import sys

import httpx
import pytest

from tests.support import ROOT
from tests.support.commands import start_command
from trimtab.util import ports

SECTION = re.compile(r"^## Your own model\n(.*?)^## ", re.DOTALL | re.MULTILINE)
# With the default options, the command takes minutes; a prefix of a few steps may not pass the gate.
SHORTER = (
    "--data.limit 120 --train.max_steps 4 --evaluate.limit 8 --evaluate.max_tokens 8 "
    "--gate.min_improvement -1 --gate.min_compliance 0"
)


@pytest.fixture
def section(base, tmp_path) -> str:
    """Section of the README with a copy of the default model as the own model, and a free port."""
    match = SECTION.search((ROOT / "README.md").read_text())
    assert match
    shutil.copytree(base.path, tmp_path / "my-model")
    return match[1].replace("./my-model", str(tmp_path / "my-model")).replace("8000", str(ports.find_free_ports(1)[0]))


def test_commands_and_example_serve_an_own_model(section, home, tmp_path):
    lines = re.findall(r"^\$ \.venv/bin/trimtab (.*)$", section, re.MULTILINE)
    assert [line.split()[0] for line in lines] == ["align", "list", "serve"]
    align, show, serve = (shlex.split(line) for line in lines)
    for name, arguments in (("align", [*align, *SHORTER.split()]), ("list", show)):
        command = start_command(arguments, tmp_path / f"{name}.log")
        assert command.process.wait(1200) == 0, command.log.read_text()
    assert "mine" in (tmp_path / "list.log").read_text()
    server = start_command(serve, tmp_path / "serve.log")
    try:
        url = re.search(r'base_url="(.*)/v1"', section)[1]
        server.wait_until(lambda: is_ready(url))
        example = next(code for code in re.findall(r"```python\n(.*?)```", section, re.DOTALL) if "OpenAI(" in code)
        completed = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, check=False)
        assert completed.returncode == 0, completed.stderr
        assert "'name': 'mine'" in completed.stdout
    finally:
        server.process.terminate()
        server.process.wait(120)


def is_ready(url: str) -> bool:
    """Return whether a server answers."""
    try:
        return httpx.get(f"{url}/health").is_success
    except httpx.TransportError:
        return False
