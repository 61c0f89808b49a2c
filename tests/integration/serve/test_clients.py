"""Every example of docs/clients.md, run as it stands but for the server's address."""

import re
import subprocess
import sys

import pytest

from tests.support import ROOT

PAGE = (ROOT / "docs" / "clients.md").read_text()
EXAMPLES = re.findall(r"```(python|bash)\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize(
    ("language", "code"), EXAMPLES, ids=[f"{number} {language}" for number, (language, _) in enumerate(EXAMPLES)]
)
def test_examples_of_the_page_run(url, language, code):
    command = [sys.executable, "-c"] if language == "python" else ["bash", "-euc"]
    done = subprocess.run(
        [*command, code.replace("http://localhost:8000", url)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) > 10
    assert '"error"' not in done.stdout


def test_there_are_examples_of_every_client():
    assert {word for word in ("OpenAI", "AsyncOpenAI", "ChatOpenAI", "curl") if word in PAGE} == {
        "OpenAI",
        "AsyncOpenAI",
        "ChatOpenAI",
        "curl",
    }
