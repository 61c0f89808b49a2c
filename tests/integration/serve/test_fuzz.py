"""Requests generated from the server's OpenAPI description: no server errors and no hanging requests."""

import json
import os
from collections import Counter

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import booleans

from tests.support.chat_client import BASE

# Cases for each operation: five, or as many as TRIMTAB_FUZZ. Up to FIXED of them are the same in every run; more are random.
CASES, FIXED = int(os.environ.get("TRIMTAB_FUZZ", "0")), 60
ANSWER_SECONDS = 120
# Responses at capacity and after the time limit.
BUSY = (503, 504)
TOKEN_LIMITS = {"/v1/responses": "max_output_tokens"}


@pytest.mark.timeout(600 + 10 * CASES)
def test_no_generated_request_gives_a_server_error(url):
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    operations = [operation.ok() for operation in schema.get_all_operations()]
    assert {"/v1/chat/completions", "/v1/completions", "/v1/score", "/v1/models"} <= {
        operation.path for operation in operations
    }
    statuses: Counter[int] = Counter()
    for operation in operations:
        case_settings = settings(
            max_examples=CASES or 5,
            derandomize=CASES <= FIXED,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        case_settings(
            given(operation.as_strategy(), booleans())(lambda case, set_model: statuses.update([send_case(case, set_model)]))
        )()
    print(f"{statuses.total()} cases of {len(operations)} operations, by status: {dict(sorted(statuses.items()))}")
    assert httpx.get(f"{url}/health", timeout=ANSWER_SECONDS).status_code == 200


def send_case(case: schemathesis.Case, set_model: bool) -> int:
    """Send a case, check its status and return it."""
    if isinstance(case.body, dict):
        case.body |= {"model": BASE} if set_model else {}
        # Short answers save time.
        case.body.setdefault(TOKEN_LIMITS.get(case.path, "max_tokens"), 4)
    response = case.call(timeout=ANSWER_SECONDS)
    is_fine = response.status_code < 500 or response.status_code in BUSY
    # In one line, so that the case can be repeated.
    assert is_fine, f"{case.method} {case.path} {json.dumps(case.body, default=str)[:8000]}: {response.text[:1000]}"
    return response.status_code
