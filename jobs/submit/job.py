"""Jobs of `trimtab submit` and `trimtab jobs`: submission, logs and termination through Ray's Jobs API.

trimtab submit --name study-1 --address http://localhost:8265 --working_dir . --wait -- study --config jobs/configs/study.yaml
trimtab jobs list
"""

import asyncio
import logging
import os
import shlex
import sys
import time
from collections.abc import Generator
from contextlib import chdir, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import aiohttp
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient
from rich.table import Table

from trimtab.cli import main
from trimtab.cli.console import console, print_line
from trimtab.errors import InterruptedByUserError, JobError, NotFoundError, UsageError
from trimtab.jobs.runtime.config import as_source_list
from trimtab.jobs.submit.config import JobsConfig, LogsConfig, StopConfig, SubmitConfig
from trimtab.util.environment import set_variables

# Longer than that of drivers: each poll is an HTTP request to the dashboard.
POLL_SECONDS = 1.0
ADDRESS = "RAY_API_SERVER_ADDRESS"
# Seconds between the signals SIGTERM and SIGKILL to a stopped job; Ray's default is 3.
STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"


@dataclass(frozen=True)
class ClusterJob:
    """Job as `trimtab jobs list` shows it.

    Attributes:
        name: submission id of the job.
        status: status of the job in Ray's terms.
        command: trimtab command, or the entry point of a job that trimtab did not submit.
        began: start time (seconds since 1970), None before the start.
        ended: end time (seconds since 1970), None before the end.
        exit_code: exit code of the command, None if unknown.
        message: status message of Ray.
    """

    name: str
    status: str
    command: str
    began: float | None
    ended: float | None
    exit_code: int | None
    message: str


def run_submit(config: SubmitConfig) -> dict[str, Any]:
    """Run `trimtab submit`.

    Returns:
        The finished job if it was followed, else its name.

    Raises:
        UsageError: if the options are invalid or the name is taken.
        JobError: if the cluster is not available, or the followed job failed.
    """
    if config.working_dir and not Path(config.working_dir).is_dir():
        raise UsageError(f"submit: {config.working_dir} is not a folder")
    with chdir(config.working_dir or "."):
        main.check_arguments(config.command)
    with _client(config.address) as client:
        if (job := _find_job(client, config.name)) is None:
            submission_id = client.submit_job(
                entrypoint=_entrypoint(config),
                submission_id=config.name,
                runtime_env=_runtime_env(config),
                metadata={"trimtab": shlex.join(config.command)},
                entrypoint_num_cpus=config.num_cpus or None,
                entrypoint_num_gpus=config.num_gpus or None,
            )
            print_line(f"submitted {submission_id}")
        elif not config.attach:
            conflict = f"a job {config.name!r} already exists ({job.status.lower()})"
            raise UsageError(f"{conflict}. Choose another --name, or follow it with --attach true")
        return _follow(client, config.name) if config.wait or config.attach else {"name": config.name}


def run_jobs_list(config: JobsConfig) -> list[dict[str, Any]]:
    """Run `trimtab jobs list`.

    Returns:
        All jobs of the cluster, oldest first, as JSON values.
    """
    with _client(config.address) as client:
        jobs = sorted((_build_job(details) for details in client.list_jobs()), key=lambda job: job.began or 0)
    table = Table(*("name", "status", "began", "took", "command"))
    for job in jobs:
        began = time.strftime("%Y-%m-%d %H:%M", time.localtime(job.began)) if job.began else "-"
        duration = f"{(job.ended or time.time()) - job.began:.0f} s" if job.began else "-"
        table.add_row(job.name, job.status.lower(), began, duration, job.command)
    console.print(table)
    return [asdict(job) for job in jobs]


def run_jobs_logs(config: LogsConfig) -> dict[str, Any]:
    """Run `trimtab jobs logs`: print the log of a job, with `follow` until the job ends.

    Returns:
        The job as JSON values.

    Raises:
        NotFoundError: if the cluster has no such job.
        JobError: if the cluster is not available, or the followed job failed.
    """
    with _client(config.address) as client:
        job = _get_job(client, config.name)
        if config.follow:
            return _follow(client, config.name)
        _write(client.get_job_logs(config.name))
    return asdict(job)


def run_jobs_stop(config: StopConfig) -> dict[str, Any]:
    """Run `trimtab jobs stop`: stop a job and wait until it has ended.

    Returns:
        The job as JSON values.

    Raises:
        NotFoundError: if the cluster has no such job.
        JobError: if the cluster is not available.
    """
    with _client(config.address) as client:
        if not _has_ended(_get_job(client, config.name)):
            client.stop_job(config.name)
        while not _has_ended(job := _get_job(client, config.name)):
            time.sleep(POLL_SECONDS)
    print_line(f"{config.name}: {job.status.lower()}")
    return asdict(job)


def _follow(client: JobSubmissionClient, name: str) -> dict[str, Any]:
    """Print a job's log until it ends; raise JobError with its exit code if it failed. Ctrl-C leaves the job running."""

    async def follow() -> None:
        async for chunk in client.tail_job_logs(name):
            _write(chunk)

    try:
        asyncio.run(follow())
        while not _has_ended(job := _get_job(client, name)):
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        raise InterruptedByUserError(
            f"job {name} keeps running. Follow it with trimtab jobs logs {name} --follow true, "
            f"stop it with trimtab jobs stop {name}"
        ) from None
    if job.status != JobStatus.SUCCEEDED.value:
        reason = f"with exit code {job.exit_code}" if job.exit_code else f"({_get_first_line(job.message)})"
        error = JobError(f"job {name} {job.status.lower()} {reason}")
        error.exit_code = job.exit_code if job.exit_code and job.exit_code > 0 else 1
        raise error
    return asdict(job)


def _entrypoint(config: SubmitConfig) -> str:
    command = ["python", "-m", "trimtab", *config.command]
    wrapper = ["python", "-m", "trimtab.jobs.submit.retry", str(config.max_retries), "--"] if config.max_retries else []
    return shlex.join([*wrapper, *command])


def _runtime_env(config: SubmitConfig) -> dict[str, Any]:
    variables = as_source_list(config.env_vars)
    missing = [name for name in variables if name not in os.environ]
    if missing:
        raise UsageError(f"submit: the environment variable {missing[0]} is not set")
    values = {STOP_WAIT: str(config.stop_wait_seconds)} | {name: os.environ[name] for name in variables}
    runtime_env: dict[str, Any] = {"env_vars": values}
    if config.working_dir:
        runtime_env["working_dir"] = config.working_dir
    if config.requirements:
        if not Path(config.requirements).is_file():
            raise UsageError(f"submit: there is no file {config.requirements}")
        runtime_env["uv"] = config.requirements
    return runtime_env | ({"image_uri": config.image_uri} if config.image_uri else {})


@contextmanager
def _client(address: str | None) -> Generator[JobSubmissionClient]:
    """Yield a client of the cluster's Jobs API; raise UsageError without an address, JobError if a request fails."""
    url = address or os.environ.get(ADDRESS)
    if not url:
        raise UsageError(f"no cluster given. Use --address http://HEAD:8265, or set {ADDRESS}")
    # The client logs every closed connection.
    logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)
    try:
        # In Ray, this variable takes precedence over the address argument.
        with set_variables({ADDRESS: url}):
            yield JobSubmissionClient(url)
    except AuthenticationError as error:
        raise JobError(
            f"authentication failed at {url}. Set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to the token of the cluster"
        ) from error
    except (ConnectionError, requests.RequestException, aiohttp.ClientError) as error:
        raise JobError(f"no Ray cluster answers at {url}: {_get_first_line(error)}") from error
    except RuntimeError as error:
        if isinstance(error, JobError):
            raise
        raise JobError(f"request to the cluster at {url} failed: {_get_first_line(error)}") from error


def _find_job(client: JobSubmissionClient, name: str) -> ClusterJob | None:
    return next((_build_job(details) for details in client.list_jobs() if details.submission_id == name), None)


def _get_job(client: JobSubmissionClient, name: str) -> ClusterJob:
    if (job := _find_job(client, name)) is None:
        names = ", ".join(sorted(str(d.submission_id) for d in client.list_jobs() if d.submission_id))
        raise NotFoundError(f"no job {name!r} on this cluster; there are: {names or 'none'}")
    return job


def _build_job(details: JobDetails) -> ClusterJob:
    command = (details.metadata or {}).get("trimtab", details.entrypoint)
    began, ended = (time_ms / 1000 if time_ms else None for time_ms in (details.start_time, details.end_time))
    name = details.submission_id or details.job_id or "-"
    return ClusterJob(name, details.status.value, command, began, ended, details.driver_exit_code, details.message or "")


def _has_ended(job: ClusterJob) -> bool:
    return JobStatus(job.status).is_terminal()


def _get_first_line(message: object) -> str:
    lines = [line.strip() for line in str(message).splitlines() if line.strip()]
    return lines[0][:300] if lines else "no reason given"


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
