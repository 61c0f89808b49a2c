"""What is deployed: linted, held against Kubernetes' own schemas, and its commands against what they start."""

import copy
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import ray
import yaml
from ray.serve.schema import ServeDeploySchema

from tests.support import ROOT
from trimtab.cli import main
from trimtab.serve.config import ServeConfig

DEPLOY = ROOT / "deploy"
MANIFESTS = sorted((DEPLOY / "kuberay").glob("*.yaml"))
KUBERNETES = "1.31"
# The fields of KubeRay's objects, version v1, that these files may use: a wrong name would be dropped without a word.
CLUSTER = {
    "authOptions": {"mode", "secretName"},
    "autoscalerOptions": {"idleTimeoutSeconds", "imagePullPolicy", "resources", "upscalingMode", "version"},
    "enableInTreeAutoscaling": None,
    "headGroupSpec": {"rayStartParams", "serviceType", "template"},
    "rayVersion": None,
    "suspend": None,
    "workerGroupSpecs": {
        "groupName",
        "idleTimeoutSeconds",
        "maxReplicas",
        "minReplicas",
        "numOfHosts",
        "rayStartParams",
        "replicas",
        "template",
    },
}
FIELDS = {
    "RayCluster": CLUSTER,
    "RayJob": {
        "activeDeadlineSeconds": None,
        "backoffLimit": None,
        "entrypoint": None,
        "rayClusterSpec": CLUSTER,
        "runtimeEnvYAML": None,
        "shutdownAfterJobFinishes": None,
        "submissionMode": None,
        "ttlSecondsAfterFinished": None,
    },
    "RayService": {"rayClusterConfig": CLUSTER, "serveConfigV2": None, "upgradeStrategy": None},
}


def objects() -> list[tuple[str, dict[str, Any]]]:
    found = [(path.name, each) for path in MANIFESTS for each in yaml.safe_load_all(path.read_text())]
    assert {each["kind"] for _, each in found} == {*FIELDS, "PersistentVolumeClaim", "NetworkPolicy"}
    return found


def pods() -> list[tuple[str, dict[str, Any]]]:
    """Every pod's template, with the file and the group that it is in."""
    found: list[tuple[str, dict[str, Any]]] = []
    for name, each in objects():
        spec = each["spec"]
        if each["kind"] in FIELDS:
            cluster = spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec
            found.append((f"{name} head", cluster["headGroupSpec"]["template"]))
            found += [(f"{name} {group['groupName']}", group["template"]) for group in cluster["workerGroupSpecs"]]
    return found


@pytest.mark.parametrize(("name", "each"), objects(), ids=lambda v: v if isinstance(v, str) else v["kind"])
def test_objects_are_what_kubernetes_and_its_operator_know(name, each):
    if each["kind"] in FIELDS:
        assert each["apiVersion"] == "ray.io/v1"
        assert unknown(each["spec"], FIELDS[each["kind"]]) == []
    else:
        kubernetes_validate.validate(each, KUBERNETES, strict=True)


def unknown(spec: dict[str, Any], fields: Any) -> list[str]:
    """Names in a spec that its kind does not have."""
    found = [key for key in spec if key not in fields]
    for key, inner in fields.items() if isinstance(fields, dict) else ():
        for part in (spec[key] if isinstance(spec.get(key), list) else [spec[key]]) if inner and key in spec else []:
            found += unknown(part, inner)
    return found


def test_a_wrong_name_is_found():
    spec = copy.deepcopy(dict(objects())["raycluster.yaml"]["spec"])
    spec["workerGroupSpecs"][0]["maxReplica"] = 3
    assert unknown(spec, CLUSTER) == ["maxReplica"]


@pytest.mark.parametrize(("name", "template"), pods(), ids=lambda v: v if isinstance(v, str) else "pod")
def test_pods_are_valid_and_have_no_more_rights_than_they_need(name, template):
    kubernetes_validate.validate(
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": template["spec"]}, KUBERNETES, strict=True
    )
    assert template["spec"]["securityContext"]["runAsNonRoot"] is True
    for container in template["spec"]["containers"]:
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert {"cpu", "memory"} <= container["resources"]["limits"].keys()
        assert {mount["name"] for mount in container["volumeMounts"]} == {v["name"] for v in template["spec"]["volumes"]}


def test_every_cluster_asks_for_a_token():
    specs = [each["spec"] for _, each in objects() if each["kind"] in FIELDS]
    clusters = [spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec for spec in specs]
    assert [cluster["authOptions"] for cluster in clusters] == [{"mode": "token"}] * 3
    assert {cluster["rayVersion"] for cluster in clusters} == {ray.__version__}


def test_the_server_and_the_job_are_called_as_they_can_be():
    found = dict(objects())
    config = ServeDeploySchema(**yaml.safe_load(found["rayservice.yaml"]["spec"]["serveConfigV2"]))
    (application,) = config.applications
    settings = main.build_settings(ServeConfig, application.args, "rayservice.yaml")
    assert (settings.host, settings.max_replicas, settings.api_key_file) == ("0.0.0.0", 4, "/etc/trimtab/keys.json")
    command = shlex.split(found["rayjob.yaml"]["spec"]["entrypoint"])
    assert command[0] == "trimtab"
    main.check_arguments(command[1:])


def test_the_dockerfile_is_linted():
    lint = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([lint, DEPLOY / "Dockerfile"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    targets = [line.split() for line in (DEPLOY / "Dockerfile").read_text().splitlines() if line.startswith("FROM")]
    assert [words[3] for words in targets] == ["common", "cpu", "gpu"]
    assert (DEPLOY / "Dockerfile").read_text().count("USER 1000") == 2


def test_mlflow_is_reached_from_this_machine_only_and_has_a_password():
    compose = yaml.safe_load((DEPLOY / "mlflow" / "compose.yaml").read_text())
    services = compose["services"]
    assert all(port.startswith("127.0.0.1:") for service in services.values() for port in service.get("ports", []))
    assert services["postgres"]["environment"]["POSTGRES_PASSWORD"].startswith("${POSTGRES_PASSWORD:?")
    assert all("latest" not in service["image"] for service in services.values())
    assert all("healthcheck" in service for service in services.values())
    command = shlex.split(services["mlflow"]["command"])
    done = subprocess.run(
        [sys.executable, "-m", *command[:2], "--help"], capture_output=True, text=True, check=True, env=os.environ
    )
    assert all(word in done.stdout for word in command if word.startswith("--"))
    json.dumps(compose)
