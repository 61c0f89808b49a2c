"""Client of the Jobs API: its address in the environment."""

import os

import pytest

from trimtab.errors import JobError
from trimtab.jobs.submit import job

URL = "http://head:8265"


@pytest.mark.parametrize("previous", [None, "http://other:8265"])
@pytest.mark.parametrize("error", [None, ConnectionError("refused")])
def test_address_is_set_only_while_client_is_used(previous, error, monkeypatch):
    monkeypatch.setattr(job, "JobSubmissionClient", lambda url: os.environ[job.ADDRESS])
    if previous is None:
        monkeypatch.delenv(job.ADDRESS, raising=False)
    else:
        monkeypatch.setenv(job.ADDRESS, previous)

    def use_client() -> None:
        with job._client(URL) as address:
            assert address == os.environ[job.ADDRESS] == URL
            if error:
                raise error

    if error:
        with pytest.raises(JobError, match="no Ray cluster answers at http://head:8265: refused"):
            use_client()
    else:
        use_client()
    assert os.environ.get(job.ADDRESS) == previous
