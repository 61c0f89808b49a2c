"""Deployment files: manifests against Kubernetes and KubeRay schemas, their commands, the Dockerfile, and MLflow's compose."""

import copy
import json
import os
import shlex
import subprocess
import sys
from fnmatch import fnmatch
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
KUBERNETES_VERSION = "1.31"
# Fields of KubeRay's v1 objects that the manifests may use. Kubernetes drops unknown fields without an error.
CLUSTER_FIELDS = {
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
SPEC_FIELDS = {
    "RayCluster": CLUSTER_FIELDS,
    "RayJob": {
        "activeDeadlineSeconds": None,
        "backoffLimit": None,
        "entrypoint": None,
        "rayClusterSpec": CLUSTER_FIELDS,
        "runtimeEnvYAML": None,
        "shutdownAfterJobFinishes": None,
        "submissionMode": None,
        "ttlSecondsAfterFinished": None,
    },
    "RayService": {"rayClusterConfig": CLUSTER_FIELDS, "serveConfigV2": None, "upgradeStrategy": None},
}


def load_manifests() -> list[tuple[str, dict[str, Any]]]:
    """Load all objects of the manifests, each with its file name."""
    manifests = [(path.name, manifest) for path in MANIFESTS for manifest in yaml.safe_load_all(path.read_text())]
    assert {manifest["kind"] for _, manifest in manifests} == {*SPEC_FIELDS, "PersistentVolumeClaim", "NetworkPolicy"}
    return manifests


def list_pod_templates() -> list[tuple[str, dict[str, Any]]]:
    """List the pod templates of all clusters, each with its file and group."""
    templates: list[tuple[str, dict[str, Any]]] = []
    for name, manifest in load_manifests():
        spec = manifest["spec"]
        if manifest["kind"] in SPEC_FIELDS:
            cluster = spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec
            templates.append((f"{name} head", cluster["headGroupSpec"]["template"]))
            templates += [(f"{name} {group['groupName']}", group["template"]) for group in cluster["workerGroupSpecs"]]
    return templates


@pytest.mark.parametrize(
    ("name", "manifest"), load_manifests(), ids=lambda value: value if isinstance(value, str) else value["kind"]
)
def test_manifest_matches_schema(name, manifest):
    if manifest["kind"] in SPEC_FIELDS:
        assert manifest["apiVersion"] == "ray.io/v1"
        assert find_unknown_fields(manifest["spec"], SPEC_FIELDS[manifest["kind"]]) == []
    else:
        kubernetes_validate.validate(manifest, KUBERNETES_VERSION, strict=True)


def find_unknown_fields(spec: dict[str, Any], fields: Any) -> list[str]:
    """Find keys of a spec that are not among its fields."""
    unknown = [key for key in spec if key not in fields]
    for key, inner in fields.items() if isinstance(fields, dict) else ():
        for part in (spec[key] if isinstance(spec.get(key), list) else [spec[key]]) if inner and key in spec else []:
            unknown += find_unknown_fields(part, inner)
    return unknown


def test_finds_unknown_field():
    spec = copy.deepcopy(dict(load_manifests())["raycluster.yaml"]["spec"])
    spec["workerGroupSpecs"][0]["maxReplica"] = 3
    assert find_unknown_fields(spec, CLUSTER_FIELDS) == ["maxReplica"]


@pytest.mark.parametrize(
    ("name", "template"), list_pod_templates(), ids=lambda value: value if isinstance(value, str) else "pod"
)
def test_pod_is_valid_and_unprivileged(name, template):
    kubernetes_validate.validate(
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": template["spec"]},
        KUBERNETES_VERSION,
        strict=True,
    )
    assert template["spec"]["securityContext"]["runAsNonRoot"] is True
    for container in template["spec"]["containers"]:
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert {"cpu", "memory"} <= container["resources"]["limits"].keys()
        assert {mount["name"] for mount in container["volumeMounts"]} == {
            volume["name"] for volume in template["spec"]["volumes"]
        }


def test_clusters_require_token_authentication():
    specs = [manifest["spec"] for _, manifest in load_manifests() if manifest["kind"] in SPEC_FIELDS]
    clusters = [spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec for spec in specs]
    assert [cluster["authOptions"] for cluster in clusters] == [{"mode": "token"}] * 3
    assert {cluster["rayVersion"] for cluster in clusters} == {ray.__version__}


def test_serve_config_and_job_entrypoint_are_valid():
    manifests = dict(load_manifests())
    config = ServeDeploySchema(**yaml.safe_load(manifests["rayservice.yaml"]["spec"]["serveConfigV2"]))
    (application,) = config.applications
    settings = main.build_settings(ServeConfig, application.args, "rayservice.yaml")
    assert (settings.host, settings.max_replicas, settings.api_key_file) == ("0.0.0.0", 4, "/etc/trimtab/keys.json")
    command = shlex.split(manifests["rayjob.yaml"]["spec"]["entrypoint"])
    assert command[0] == "trimtab"
    main.check_arguments(command[1:])


def test_dockerfile_passes_hadolint():
    hadolint = Path(sys.executable).parent / "hadolint"
    result = subprocess.run([hadolint, DEPLOY / "Dockerfile"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    targets = [line.split() for line in (DEPLOY / "Dockerfile").read_text().splitlines() if line.startswith("FROM")]
    assert [words[3] for words in targets] == ["common", "cpu", "gpu"]
    assert (DEPLOY / "Dockerfile").read_text().count("USER 1000") == 2


@pytest.mark.parametrize("path", ["deploy/mlflow/.env", "keys.json", "keys.json.lock"])
def test_secrets_in_the_checkout_go_nowhere(path):
    """Neither into a commit, nor into the image, nor to the nodes of a cluster."""
    commits, image = ((ROOT / file).read_text().splitlines() for file in (".gitignore", "deploy/Dockerfile.dockerignore"))
    nodes = yaml.safe_load((ROOT / "cluster.yaml").read_text())["rsync_exclude"]
    for patterns in (commits, image, nodes):
        assert any(fnmatch(Path(path).name, pattern.removeprefix("**/")) for pattern in patterns)


def test_mlflow_compose_is_local_and_requires_password():
    compose = yaml.safe_load((DEPLOY / "mlflow" / "compose.yaml").read_text())
    services = compose["services"]
    assert all(port.startswith("127.0.0.1:") for service in services.values() for port in service.get("ports", []))
    assert services["postgres"]["environment"]["POSTGRES_PASSWORD"].startswith("${POSTGRES_PASSWORD:?")
    assert all("latest" not in service["image"] for service in services.values())
    assert all("healthcheck" in service for service in services.values())
    command = shlex.split(services["mlflow"]["command"])
    result = subprocess.run(
        [sys.executable, "-m", *command[:2], "--help"], capture_output=True, text=True, check=True, env=os.environ
    )
    assert all(word in result.stdout for word in command if word.startswith("--"))
    json.dumps(compose)
