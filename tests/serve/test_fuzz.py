"""Requests made up from the server's own description: none gives a 5xx, none hangs."""

import os

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings

# More of them, each time others, with TRIMTAB_FUZZ=1000.
CASES = int(os.environ.get("TRIMTAB_FUZZ", "0"))
ANSWER_SECONDS = 60
LIMITS = {"/v1/responses": "max_output_tokens"}
ENDINGS = (503, 504)


@pytest.fixture
def api(url):
    return schemathesis.openapi.from_url(f"{url}/openapi.json")


schema = schemathesis.pytest.from_fixture("api")


@schema.parametrize()
@settings(
    max_examples=CASES or 12,
    derandomize=not CASES,
    deadline=None,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_no_case_gives_a_server_error(case):
    if isinstance(case.body, dict):
        # Answers need not be long for what is looked for here.
        case.body.setdefault(LIMITS.get(case.path, "max_tokens"), 4)
    reply = case.call(timeout=ANSWER_SECONDS)
    assert reply.status_code < 500 or reply.status_code in ENDINGS, (case.path, case.body, reply.text)
