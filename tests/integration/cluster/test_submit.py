"""Commands sent to a Ray cluster that asks for a token: followed, refused, stopped, tried again."""

import os
import signal
import subprocess
import sys
from collections.abc import Generator

import httpx
import pytest

from tests.support.prompt_rows import prompt_files
from tests.support.ray_head import head
from trimtab.util import ports

TOKEN = "a" * 32
RUN_SECONDS = 180


@pytest.fixture(scope="module")
def address() -> Generator[str]:
    """The dashboard of a cluster of one node, with token authentication on."""
    secret = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    with head(ports.find_free_ports()[0], "--num-cpus", "2", environment=secret, token=TOKEN) as up:
        yield up.dashboard


@pytest.fixture
def trimtab(address, tmp_path):
    """The command line in a process of its own, as Ray reads its token once: exit code and what was said."""

    def run(*words: str, **environment: str) -> tuple[int, str]:
        own = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_API_SERVER_ADDRESS": address} | environment
        command = [sys.executable, "-m", "trimtab", *words]
        done = subprocess.run(command, env=own, cwd=tmp_path, capture_output=True, text=True, timeout=RUN_SECONDS, check=False)
        return done.returncode, done.stdout + done.stderr

    return run


def test_a_job_is_followed_listed_and_its_name_is_taken_then(trimtab):
    code, said = trimtab("submit", "--name", "first", "--wait", "--", "assets")
    assert code == 0, said
    assert "submitted first" in said
    assert "SmolLM2" in said
    code, said = trimtab("jobs", "list")
    (line,) = [line for line in said.splitlines() if "first" in line]
    assert "succeeded" in line
    assert "assets" in line
    code, said = trimtab("submit", "--name", "first", "--", "assets")
    assert (code, said.count("\n")) == (2, 1)
    assert "a job 'first' already exists (succeeded)" in said
    for words in (["submit", "--name", "first", "--attach", "true", "--", "assets"], ["jobs", "logs", "first"]):
        code, said = trimtab(*words)
        assert code == 0
        assert "SmolLM2" in said
    code, said = trimtab("jobs", "logs", "none")
    assert code == 2
    assert "no job 'none' on this cluster; there are: first" in said


def test_a_yaml_runs_there_as_it_does_here_and_fails_with_the_same_code(trimtab, tmp_path):
    """The folder is sent along; a file that is not in it is told as it would be here."""
    prompt_files(tmp_path)
    (tmp_path / "mine.yaml").write_text("name: mine\ndata:\n  harmful: harmful.jsonl\n  benign: benign.jsonl\n")
    code, said = trimtab("filter", "--config", "mine.yaml")
    here = [line for line in said.splitlines() if "│" in line]
    assert code == 0
    assert here
    code, said = trimtab("submit", "--name", "second", "--wait", "--working_dir", ".", "--", "filter", "--config", "mine.yaml")
    assert code == 0, said
    assert [line for line in said.splitlines() if "│" in line] == here
    (tmp_path / "harmful.jsonl").unlink()
    sent = ["submit", "--name", "third", "--wait", "--working_dir", ".", "--max_retries", "2", "--"]
    code, said = trimtab(*sent, "filter", "--config", "mine.yaml")
    assert code == 2
    assert "harmful.jsonl" in said
    assert "attempt 1 of 3" not in said
    assert said.strip().splitlines()[-1].startswith("trimtab: job third failed with exit code 2")


def test_a_job_is_stopped(trimtab):
    assert trimtab("submit", "--name", "server", "--", "serve", "--port", str(ports.find_free_ports()[0]))[0] == 0
    code, said = trimtab("jobs", "stop", "server")
    assert code == 0
    assert "server: stopped" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--name", "x", "--", "algin"], "no command 'algin'"),
        (["--name", "x", "--", "align", "--steps", "3"], "align: "),
        (["--name", "x"], "no command given. Add it after --"),
        (["--name", "a b", "--", "assets"], "'a b' is not a valid job name"),
        (["--name", "x", "--working_dir", "nowhere", "--", "assets"], "nowhere is not a folder"),
        (["--name", "x", "--requirements", "nowhere", "--", "assets"], "there is no file nowhere"),
        (["--name", "x", "--env_vars", "NOT_THERE", "--", "assets"], "the environment variable NOT_THERE is not set"),
    ],
)
def test_wrong_usage_is_said_before_anything_is_sent(trimtab, words, message):
    code, said = trimtab("submit", *words)
    assert code == 2
    assert message in said
    assert said.count("\n") == 1


def test_nothing_is_done_without_the_token(trimtab, address):
    code, said = trimtab("submit", "--name", "thief", "--", "assets", RAY_AUTH_TOKEN="b" * 32)
    assert (code, said.count("\n")) == (1, 1)
    assert "token" in said
    for path in ("/api/jobs/", "/nodes?view=summary"):
        assert httpx.get(f"{address}{path}", timeout=30).status_code == 401


def test_a_cluster_that_is_not_there_is_said_in_one_line(trimtab):
    code, said = trimtab("jobs", "list", RAY_API_SERVER_ADDRESS="")
    assert (code, said.count("\n")) == (2, 1)
    assert "no cluster given" in said
    code, said = trimtab("jobs", "list", "--address", f"http://127.0.0.1:{ports.find_free_ports()[0]}")
    assert (code, said.count("\n")) == (1, 1)
    assert said.startswith("trimtab: no Ray cluster answers at http://127.0.0.1")


@pytest.mark.parametrize(("fails", "code", "tries"), [(2, 0, 3), (9, 7, 3)])
def test_what_fails_is_tried_again(tmp_path, fails, code, tries):
    count = "p = pathlib.Path('n'); n = len(p.read_text()) if p.exists() else 0; p.write_text('x' * (n + 1))"
    script = f"import pathlib; {count}; exit(7 if n < {fails} else 0)"
    again = "from trimtab.jobs.submit import retry; retry.WAIT_SECONDS = 0; import sys; sys.exit(retry.main(sys.argv[1:]))"
    command = [sys.executable, "-c", again, "2", "--", sys.executable, "-c", script]
    assert subprocess.run(command, cwd=tmp_path, timeout=RUN_SECONDS, check=False).returncode == code
    assert (tmp_path / "n").read_text() == "x" * tries


def test_a_command_that_is_run_again_ends_where_it_is_stopped():
    command = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(600)"]
    with subprocess.Popen(
        [sys.executable, "-m", "trimtab.jobs.submit.retry", "3", "--", *command], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"up\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 130
