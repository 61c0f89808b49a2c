"""Compose file of MLflow and cluster file."""

import os
import re
import shlex
import subprocess
import sys
from typing import Any

import botocore.session
import pytest
import yaml
from botocore.validate import ParamValidator
from sqlalchemy.engine import make_url

from tests.support import ROOT
from tests.support.manifests import DEPLOY, WRITABLE


def load_compose_services() -> dict[str, dict[str, Any]]:
    """Load the services of MLflow's compose file by name."""
    return yaml.safe_load((DEPLOY / "mlflow" / "compose.yaml").read_text())["services"]


def test_mlflow_compose_is_local_and_requires_password():
    services = load_compose_services()
    assert all(port.startswith("127.0.0.1:") for service in services.values() for port in service.get("ports", []))
    password = services["postgres"]["environment"]["POSTGRES_PASSWORD"]
    assert password.startswith("${POSTGRES_PASSWORD:?")
    # libpq reads PGPASSWORD, so that the password is not part of a URI and can contain all characters.
    assert services["mlflow"]["environment"]["PGPASSWORD"] == password
    url = make_url(services["mlflow"]["environment"]["MLFLOW_BACKEND_STORE_URI"])
    assert (url.get_backend_name(), url.get_driver_name(), url.password) == ("postgresql", "psycopg2", None)
    assert (url.host, url.username, url.database) == ("postgres", "mlflow", "mlflow")
    # In single quotes, Compose takes all characters of .env literally.
    assert re.search(r"^POSTGRES_PASSWORD='[^']+'$", (DEPLOY / "mlflow" / "example.env").read_text(), re.MULTILINE)
    assert all("latest" not in service["image"] for service in services.values())
    assert all("healthcheck" in service for service in services.values())
    command = shlex.split(services["mlflow"]["command"])
    result = subprocess.run(
        [sys.executable, "-m", *command[:2], "--help"], capture_output=True, text=True, check=True, env=os.environ
    )
    assert all(word in result.stdout for word in command if word.startswith("--"))


def test_mlflow_compose_limits_its_containers():
    services = load_compose_services()
    for service in services.values():
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert {"mem_limit", "cpus", "pids_limit"} <= service.keys()
        assert not {"privileged", "network_mode", "pid"} & service.keys()
    # The image of PostgreSQL starts as root and changes to its own user.
    assert services["postgres"]["cap_add"] == ["CHOWN", "DAC_READ_SEARCH", "FOWNER", "SETGID", "SETUID"]
    mlflow = services["mlflow"]
    assert "cap_add" not in mlflow
    assert mlflow["read_only"] is True
    assert {entry.partition(":")[0] for entry in mlflow["tmpfs"]} == WRITABLE


def load_node_configs() -> dict[str, dict[str, Any]]:
    """Load the EC2 configuration of each node type of the cluster file."""
    types = yaml.safe_load((ROOT / "cluster.yaml").read_text())["available_node_types"]
    return {name: node_type["node_config"] for name, node_type in types.items()}


@pytest.mark.parametrize("name", load_node_configs())
def test_cluster_node_matches_ec2_api_and_protects_credentials_and_disks(name):
    config = load_node_configs()[name]
    request = botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    report = ParamValidator().validate(config | {"MinCount": 1, "MaxCount": 1}, request)
    assert not report.has_errors(), report.generate_report()
    assert config["MetadataOptions"] == {"HttpTokens": "required", "HttpPutResponseHopLimit": 1}
    assert [disk["Ebs"]["Encrypted"] for disk in config["BlockDeviceMappings"]] == [True]


def test_cluster_setup_installs_pinned_tools():
    cluster = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    commands = [*cluster["setup_commands"], *cluster["head_setup_commands"]]
    tools = [command.split()[-1] for command in commands if command.startswith("pip install")]
    assert [tool.partition("==")[0] for tool in tools] == ["uv", "boto3"]
    assert f" {tools[0]}\n" in (DEPLOY / "Dockerfile").read_text()
    for path in ("locks/cpu.txt", "locks/gpu.txt"):
        # The hashes of a package are in the lines after its name.
        assert tools[1] in [line.removesuffix(" \\") for line in (ROOT / path).read_text().splitlines()]
