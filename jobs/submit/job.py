"""`trimtab submit` and `trimtab jobs`: commands sent to a Ray cluster by its Jobs API, followed and stopped.

trimtab submit --name study-1 --address http://localhost:8265 --upload . --wait -- study --config jobs/configs/study.yaml
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
from trimtab.jobs.submit.config import JobConfig, JobsConfig, SubmitConfig

POLL_SECONDS = 1.0
ADDRESS = "RAY_API_SERVER_ADDRESS"


@dataclass(frozen=True)
class ClusterJob:
    """A job as `trimtab jobs list` shows it; `began` and `ended` in seconds since 1970."""

    name: str
    status: str
    command: str
    began: float | None
    ended: float | None
    exit_code: int | None
    message: str


def run_submit(config: SubmitConfig) -> dict[str, Any]:
    """`trimtab submit`. Raises UsageError for a name that is taken, and what the job failed with where it is waited for."""
    if config.upload and not Path(config.upload).is_dir():
        raise UsageError(f"submit: {config.upload} is no folder")
    with chdir(config.upload or "."):
        main.check_arguments(config.command)
    with _client(config.address) as client:
        if (there := _find(client, config.name)) is None:
            sent = client.submit_job(
                entrypoint=_entrypoint(config),
                submission_id=config.name,
                runtime_env=_runtime_env(config),
                metadata={"trimtab": shlex.join(config.command)},
                entrypoint_num_cpus=config.cpus or None,
                entrypoint_num_gpus=config.gpus or None,
            )
            print_line(f"submitted {sent}")
        elif not config.attach:
            taken = f"there is a job {config.name!r} already ({there.status.lower()})"
            raise UsageError(f"{taken}: choose another --name, or --attach true to follow it")
        return _followed(client, config.name) if config.wait or config.attach else {"name": config.name}


def run_jobs_list(config: JobsConfig) -> list[dict[str, Any]]:
    """`trimtab jobs list`."""
    with _client(config.address) as client:
        jobs = sorted((_job(details) for details in client.list_jobs()), key=lambda job: job.began or 0)
    table = Table(*("name", "status", "began", "took", "command"))
    for job in jobs:
        began = time.strftime("%Y-%m-%d %H:%M", time.localtime(job.began)) if job.began else "-"
        took = f"{(job.ended or time.time()) - job.began:.0f} s" if job.began else "-"
        table.add_row(job.name, job.status.lower(), began, took, job.command)
    console.print(table)
    return [asdict(job) for job in jobs]


def run_jobs_logs(config: JobConfig) -> dict[str, Any]:
    """`trimtab jobs logs`: what a job has said, and with `follow` what it goes on to say."""
    with _client(config.address) as client:
        job = _known(client, config.name)
        if config.follow:
            return _followed(client, config.name)
        _write(client.get_job_logs(config.name))
    return asdict(job)


def run_jobs_stop(config: JobConfig) -> dict[str, Any]:
    """`trimtab jobs stop`: end a job, and wait until it has."""
    with _client(config.address) as client:
        if not _ended(_known(client, config.name)):
            client.stop_job(config.name)
        while not _ended(job := _known(client, config.name)):
            time.sleep(POLL_SECONDS)
    print_line(f"{config.name}: {job.status.lower()}")
    return asdict(job)


def _followed(client: JobSubmissionClient, name: str) -> dict[str, Any]:
    """Print a job's log until it ends. Raises JobError with its exit code where it failed; Ctrl-C leaves it running."""

    async def follow() -> None:
        async for piece in client.tail_job_logs(name):
            _write(piece)

    try:
        asyncio.run(follow())
        while not _ended(job := _known(client, name)):
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        raise InterruptedByUserError(
            f"{name} goes on; trimtab jobs logs {name} --follow true shows it, trimtab jobs stop {name} ends it"
        ) from None
    if job.status != JobStatus.SUCCEEDED.value:
        why = f"with exit code {job.exit_code}" if job.exit_code else f"({_first(job.message)})"
        failed = JobError(f"job {name} {job.status.lower()} {why}")
        failed.exit_code = job.exit_code if job.exit_code and job.exit_code > 0 else 1
        raise failed
    return asdict(job)


def _entrypoint(config: SubmitConfig) -> str:
    run = ["python", "-m", "trimtab", *config.command]
    again = ["python", "-m", "trimtab.jobs.submit.retry", str(config.retries), "--"] if config.retries else []
    return shlex.join([*again, *run])


def _runtime_env(config: SubmitConfig) -> dict[str, Any]:
    wanted = as_source_list(config.environment)
    missing = [name for name in wanted if name not in os.environ]
    if missing:
        raise UsageError(f"submit: there is no {missing[0]} in the environment here")
    found: dict[str, Any] = {"env_vars": {name: os.environ[name] for name in wanted}}
    if config.upload:
        found["working_dir"] = config.upload
    if config.packages:
        if not Path(config.packages).is_file():
            raise UsageError(f"submit: there is no file {config.packages}")
        found["uv"] = config.packages
    return found | ({"image_uri": config.image} if config.image else {})


@contextmanager
def _client(address: str | None) -> Generator[JobSubmissionClient]:
    """The cluster's Jobs API. Raises UsageError without an address, JobError where it does not answer or turns us down."""
    where = address or os.environ.get(ADDRESS)
    if not where:
        raise UsageError(f"which cluster? give --address http://HEAD:8265, or set {ADDRESS}")
    # It tells of every connection that ends.
    logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)
    # Ray takes its own variable for more than what it is given.
    os.environ[ADDRESS] = where
    try:
        yield JobSubmissionClient(where)
    except AuthenticationError as error:
        raise JobError(
            f"the cluster at {where} turned us down; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to its own"
        ) from error
    except (ConnectionError, requests.RequestException, aiohttp.ClientError) as error:
        raise JobError(f"no Ray cluster answers at {where}: {_first(error)}") from error
    except RuntimeError as error:
        if isinstance(error, JobError):
            raise
        raise JobError(f"the cluster at {where} did not do it: {_first(error)}") from error


def _find(client: JobSubmissionClient, name: str) -> ClusterJob | None:
    return next((_job(details) for details in client.list_jobs() if details.submission_id == name), None)


def _known(client: JobSubmissionClient, name: str) -> ClusterJob:
    if (job := _find(client, name)) is None:
        names = ", ".join(sorted(str(d.submission_id) for d in client.list_jobs() if d.submission_id))
        raise NotFoundError(f"no job {name!r} on this cluster; there are: {names or 'none'}")
    return job


def _job(details: JobDetails) -> ClusterJob:
    command = (details.metadata or {}).get("trimtab", details.entrypoint)
    began, ended = (at / 1000 if at else None for at in (details.start_time, details.end_time))
    name = details.submission_id or details.job_id or "-"
    return ClusterJob(name, details.status.value, command, began, ended, details.driver_exit_code, details.message or "")


def _ended(job: ClusterJob) -> bool:
    return JobStatus(job.status).is_terminal()


def _first(said: object) -> str:
    lines = [line.strip() for line in str(said).splitlines() if line.strip()]
    return lines[0][:300] if lines else "no reason given"


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
