"""Traffic between versions: shares, users that keep their version, and the summary of a server's metrics."""

from collections import Counter
from pathlib import Path

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from trimtab.engine.openai.traffic_split import TrafficSplit
from trimtab.errors import JobError, UsageError
from trimtab.serve import app
from trimtab.serve.config import ServeConfig
from trimtab.serve.traffic_command import TrafficConfig, TrafficLine, run_traffic, summarize_traffic

METRICS = """
# HELP trimtab_requests_total x
# TYPE trimtab_requests_total counter
trimtab_requests_total{mode="answer",prefix="mine",status="200",version="1"} 19.0
trimtab_requests_total{mode="answer",prefix="mine",status="400",version="1"} 1.0
trimtab_requests_total{mode="shadow",prefix="mine",status="200",version="2"} 4.0
# TYPE trimtab_tokens_total counter
trimtab_tokens_total{mode="answer",prefix="mine",version="1"} 190.0
# TYPE trimtab_first_token_seconds histogram
trimtab_first_token_seconds_bucket{le="+Inf",mode="answer",prefix="mine",version="1"} 4.0
trimtab_first_token_seconds_count{mode="answer",prefix="mine",version="1"} 4.0
trimtab_first_token_seconds_sum{mode="answer",prefix="mine",version="1"} 0.2
# TYPE trimtab_risk histogram
trimtab_risk_count{detector="d",detector_version="1",mode="shadow",prefix="mine",version="2"} 3.0
trimtab_risk_sum{detector="d",detector_version="1",mode="shadow",prefix="mine",version="2"} 0.6
trimtab_risk_count{detector="e",detector_version="1",mode="shadow",prefix="mine",version="2"} 1.0
trimtab_risk_sum{detector="e",detector_version="1",mode="shadow",prefix="mine",version="2"} 0.6
# TYPE vllm:x counter
vllm:x_total 5.0
"""


def test_shares_are_respected_and_users_keep_their_version():
    split = TrafficSplit({"mine": {"champion": 95, "candidate": 5}})
    assert split.select_alias("other", None) is None
    users = {f"user {number}": split.select_alias("mine", f"user {number}") for number in range(2000)}
    assert 50 < Counter(users.values())["candidate"] < 150
    assert users == {user: split.select_alias("mine", user) for user in users}
    counts = Counter(split.select_alias("mine", None) for _ in range(2000))
    assert 50 < counts["candidate"] < 150
    assert TrafficSplit({"mine": {"champion": 0, "candidate": 1}}).select_alias("mine", None) == "candidate"


@pytest.mark.parametrize("shares", [{}, {"champion": 0}, {"champion": 2, "candidate": -1}])
def test_rejects_invalid_shares(shares):
    with pytest.raises(UsageError, match="traffic of 'mine' needs shares"):
        ServeConfig(traffic={"mine": shares})


def test_summary_has_a_line_for_each_version_and_mode():
    assert summarize_traffic(METRICS) == [
        TrafficLine("mine", "1", "answer", 20, 1, 190, pytest.approx(0.05), None),
        TrafficLine("mine", "2", "shadow", 4, 0, 0, None, pytest.approx(0.3)),
    ]


def test_unreachable_server_is_reported():
    with pytest.raises(JobError, match="no server answers"):
        run_traffic(TrafficConfig("http://127.0.0.1:9"))


def test_shipped_config_is_valid_for_serve_deploy():
    path = Path(app.__file__).parent / "config.yaml"
    config = ServeDeploySchema.model_validate(yaml.safe_load(path.read_text()))
    (application,) = config.applications
    assert application.import_path == "trimtab.serve.app:build_app"
    built_app = app.build_app(application.args)
    assert built_app._bound_deployment.name == application.deployments[0].name
    with pytest.raises(UsageError, match=r"args: .*replica_count"):
        app.build_app({"replica_count": 2})
