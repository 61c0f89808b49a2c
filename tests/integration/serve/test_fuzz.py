"""Requests made up from the server's own description: none gives a 5xx, none hangs."""

import os
from collections import Counter

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import booleans

from tests.support.chat_client import BASE

# So many for each operation; more of them, each time others, with TRIMTAB_FUZZ=500.
CASES = int(os.environ.get("TRIMTAB_FUZZ", "0"))
ANSWER_SECONDS = 120
# What the server says where it has no room, or ends what takes too long.
BUSY = (503, 504)
LIMITS = {"/v1/responses": "max_output_tokens"}


@pytest.mark.timeout(600 + 10 * CASES)
def test_no_case_gives_a_server_error(url):
    described = schemathesis.openapi.from_url(f"{url}/openapi.json")
    operations = [found.ok() for found in described.get_all_operations()]
    assert {"/v1/chat/completions", "/v1/completions", "/v1/score", "/v1/models"} <= {found.path for found in operations}
    seen: Counter[int] = Counter()
    for operation in operations:
        settings_ = settings(
            max_examples=CASES or 10,
            derandomize=not CASES,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        settings_(given(operation.as_strategy(), booleans())(lambda case, named: seen.update([check(case, named)])))()
    print(f"{seen.total()} cases of {len(operations)} operations, by status: {dict(sorted(seen.items()))}")
    assert httpx.get(f"{url}/health", timeout=ANSWER_SECONDS).status_code == 200


def check(case: schemathesis.Case, named: bool) -> int:
    """The status of its answer."""
    if isinstance(case.body, dict):
        case.body |= {"model": BASE} if named else {}
        # Answers need not be long for what is looked for here.
        case.body.setdefault(LIMITS.get(case.path, "max_tokens"), 4)
    reply = case.call(timeout=ANSWER_SECONDS)
    assert reply.status_code < 500 or reply.status_code in BUSY, (case.method, case.path, case.body, reply.text)
    return reply.status_code
