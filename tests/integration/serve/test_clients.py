"""The examples of docs/clients.md, run against the test server."""

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
def test_example_runs(url, language, code):
    command = [sys.executable, "-c"] if language == "python" else ["bash", "-euc"]
    completed = subprocess.run(
        [*command, code.replace("http://localhost:8000", url)], capture_output=True, text=True, timeout=300, check=False
    )
    assert completed.returncode == 0, completed.stderr
    assert len(completed.stdout) > 10
    assert '"error"' not in completed.stdout


def test_page_has_examples_of_all_clients():
    assert {word for word in ("OpenAI", "AsyncOpenAI", "ChatOpenAI", "curl") if word in PAGE} == {
        "OpenAI",
        "AsyncOpenAI",
        "ChatOpenAI",
        "curl",
    }
