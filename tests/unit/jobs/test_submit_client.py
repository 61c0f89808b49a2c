"""Client of the Jobs API: the address reaches Ray through the environment, which is restored afterwards."""

import os

import pytest

from trimtab.errors import JobError
from trimtab.jobs.submit import job

URL = "http://head:8265"


@pytest.mark.parametrize("former", [None, "http://other:8265"])
@pytest.mark.parametrize("error", [None, ConnectionError("refused")])
def test_the_address_is_set_only_while_a_client_is_used(former, error, monkeypatch):
    monkeypatch.setattr(job, "JobSubmissionClient", lambda url: os.environ[job.ADDRESS])
    if former is None:
        monkeypatch.delenv(job.ADDRESS, raising=False)
    else:
        monkeypatch.setenv(job.ADDRESS, former)

    def use() -> None:
        with job._client(URL) as address:
            assert address == os.environ[job.ADDRESS] == URL
            if error:
                raise error

    if error:
        with pytest.raises(JobError, match="no Ray cluster answers at http://head:8265: refused"):
            use()
    else:
        use()
    assert os.environ.get(job.ADDRESS) == former
