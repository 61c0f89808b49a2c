"""Commands submitted to a Ray cluster with token authentication."""

import os
import signal
import subprocess
import sys
from collections.abc import Generator

import httpx
import pytest

from tests.support.prompt_rows import write_prompt_files
from tests.support.ray_head import start_ray_head
from trimtab.cli.main import main
from trimtab.util import ports

TOKEN = "a" * 32
RUN_SECONDS = 180


@pytest.fixture(scope="module")
def address() -> Generator[str]:
    """Dashboard address of a one-node cluster with token authentication."""
    authentication = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    with start_ray_head(ports.find_free_ports()[0], "--num-cpus", "2", environment=authentication, token=TOKEN) as cluster:
        yield cluster.dashboard


@pytest.fixture
def run_trimtab(address, tmp_path):
    """Function that runs a trimtab command and returns its exit code and output. Ray reads its token once per process."""

    def run_command(*arguments: str, **environment: str) -> tuple[int, str]:
        variables = (
            os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_API_SERVER_ADDRESS": address} | environment
        )
        command = [sys.executable, "-m", "trimtab", *arguments]
        completed = subprocess.run(
            command, env=variables, cwd=tmp_path, capture_output=True, text=True, timeout=RUN_SECONDS, check=False
        )
        return completed.returncode, completed.stdout + completed.stderr

    return run_command


def test_job_is_followed_and_listed_and_its_name_is_taken(run_trimtab):
    code, output = run_trimtab("submit", "--name", "first", "--wait", "--", "assets")
    assert code == 0, output
    assert "submitted first" in output
    assert "SmolLM2" in output
    code, output = run_trimtab("jobs", "list")
    (line,) = [line for line in output.splitlines() if "first" in line]
    assert "succeeded" in line
    assert "assets" in line
    code, output = run_trimtab("submit", "--name", "first", "--", "assets")
    assert (code, output.count("\n")) == (2, 1)
    assert "a job 'first' already exists (succeeded)" in output
    for arguments in (["submit", "--name", "first", "--attach", "true", "--", "assets"], ["jobs", "logs", "first"]):
        code, output = run_trimtab(*arguments)
        assert code == 0
        assert "SmolLM2" in output
    code, output = run_trimtab("jobs", "logs", "none")
    assert code == 2
    assert "no job 'none' on this cluster; there are: first" in output


def test_submitted_config_has_output_and_exit_code_of_local_run(run_trimtab, tmp_path, monkeypatch, capsys):
    """The working directory is uploaded. A missing file gives the same error as in a local run, without retries."""
    write_prompt_files(tmp_path)
    (tmp_path / "mine.yaml").write_text("name: mine\ndata:\n  harmful: harmful.jsonl\n  benign: benign.jsonl\n")
    monkeypatch.chdir(tmp_path)
    assert main(["filter", "--config", "mine.yaml"]) == 0
    local_table = [line for line in capsys.readouterr().out.splitlines() if "│" in line]
    assert local_table
    code, output = run_trimtab(
        "submit", "--name", "second", "--wait", "--working_dir", ".", "--", "filter", "--config", "mine.yaml"
    )
    assert code == 0, output
    assert [line for line in output.splitlines() if "│" in line] == local_table
    (tmp_path / "harmful.jsonl").unlink()
    submit = ["submit", "--name", "third", "--wait", "--working_dir", ".", "--max_retries", "2", "--"]
    code, output = run_trimtab(*submit, "filter", "--config", "mine.yaml")
    assert code == 2
    assert "harmful.jsonl" in output
    assert "attempt 1 of 3" not in output
    assert output.strip().splitlines()[-1].startswith("trimtab: job third failed with exit code 2")


def test_stops_job(run_trimtab, address):
    """Ray reads from the environment of the job how long it waits before it kills the command."""
    assert run_trimtab("submit", "--name", "server", "--", "serve", "--port", str(ports.find_free_ports()[0]))[0] == 0
    job = httpx.get(f"{address}/api/jobs/server", headers={"authorization": f"Bearer {TOKEN}"}, timeout=30).json()
    assert job["runtime_env"]["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"] == "60"
    code, output = run_trimtab("jobs", "stop", "server")
    assert code == 0
    assert "server: stopped" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--name", "x", "--", "algin"], "no command 'algin'"),
        (["--name", "x", "--", "align", "--steps", "3"], "align: "),
        (["--name", "x"], "no command given. Add it after --"),
        (["--name", "a b", "--", "assets"], "'a b' is not a valid job name"),
        (["--name", "x", "--working_dir", "nowhere", "--", "assets"], "nowhere is not a folder"),
    ],
)
def test_rejects_wrong_usage_without_a_cluster(tmp_path, monkeypatch, capsys, arguments, message):
    """Nothing listens at the address, so that a submission would fail with another message."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", f"http://127.0.0.1:{ports.find_free_ports()[0]}")
    assert main(["submit", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--requirements", "nowhere"], "there is no file nowhere"),
        (["--env_vars", "NOT_THERE"], "the environment variable NOT_THERE is not set"),
    ],
)
def test_rejects_wrong_usage_before_submission(run_trimtab, arguments, message):
    code, output = run_trimtab("submit", "--name", "x", *arguments, "--", "assets")
    assert (code, output.count("\n")) == (2, 1)
    assert message in output


def test_rejects_wrong_or_missing_token(run_trimtab, address):
    code, output = run_trimtab("submit", "--name", "thief", "--", "assets", RAY_AUTH_TOKEN="b" * 32)
    assert (code, output.count("\n")) == (1, 1)
    assert "token" in output
    for path in ("/api/jobs/", "/nodes?view=summary"):
        assert httpx.get(f"{address}{path}", timeout=30).status_code == 401


def test_missing_cluster_is_one_error_line(monkeypatch, capsys):
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")
    assert main(["jobs", "list"]) == 2
    error = capsys.readouterr().err
    assert "no cluster given" in error
    assert error.count("\n") == 1
    assert main(["jobs", "list", "--address", f"http://127.0.0.1:{ports.find_free_ports()[0]}"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("trimtab: no Ray cluster answers at http://127.0.0.1")
    assert error.count("\n") == 1


@pytest.mark.parametrize(("failures", "code", "attempts"), [(2, 0, 3), (9, 7, 3)])
def test_retries_failed_command(tmp_path, failures, code, attempts):
    count = "p = pathlib.Path('n'); n = len(p.read_text()) if p.exists() else 0; p.write_text('x' * (n + 1))"
    script = f"import pathlib; {count}; exit(7 if n < {failures} else 0)"
    retry_driver = (
        "from trimtab.jobs.submit import retry; retry.WAIT_SECONDS = 0; import sys; sys.exit(retry.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", retry_driver, "2", "--", sys.executable, "-c", script]
    assert subprocess.run(command, cwd=tmp_path, timeout=RUN_SECONDS, check=False).returncode == code
    assert (tmp_path / "n").read_text() == "x" * attempts


UP = "print('up', flush=True)"
SIGNALED_SCRIPTS = {
    "killed by the signal": (f"import time; {UP}; time.sleep(600)", 143),
    "ends with an error after the signal": (
        f"import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(1)); {UP}; signal.pause()",
        1,
    ),
    "ends without an error after the signal": (
        f"import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); {UP}; signal.pause()",
        0,
    ),
}


@pytest.mark.parametrize(("script", "code"), SIGNALED_SCRIPTS.values(), ids=SIGNALED_SCRIPTS)
def test_sigterm_ends_command_without_retry(script, code):
    command = [sys.executable, "-m", "trimtab.jobs.submit.retry", "3", "--", sys.executable, "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "up\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == code
        assert "attempt" not in process.stdout.read()


def test_sigterm_between_attempts_ends_the_retries():
    command = [sys.executable, "-u", "-m", "trimtab.jobs.submit.retry", "3", "--", sys.executable, "-c", "exit(7)"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert "attempt 1 of 4 ended with exit code 7" in process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 7
        assert process.stdout.read() == ""
