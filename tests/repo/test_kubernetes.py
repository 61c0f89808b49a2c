"""Kubernetes manifests: schemas, pods, settings, and the serve configuration."""

import copy
import shlex
from typing import Any

import kubernetes_validate
import pytest
import ray
import yaml
from ray.serve.schema import ServeDeploySchema

from tests.support.manifests import (
    CLUSTER_FIELDS,
    KUBERNETES_VERSION,
    SPEC_FIELDS,
    SUBMITTER,
    WRITABLE,
    list_ray_specs,
    load_manifests,
)
from trimtab.cli import main
from trimtab.ray_patches import HAPROXY_OPTIONS, RETRY_ON
from trimtab.serve.config import ServeConfig
from trimtab.settings import DEFAULTS

POD_SECURITY = {"runAsNonRoot": True, "runAsUser": 1000, "fsGroup": 1000, "seccompProfile": {"type": "RuntimeDefault"}}
CONTAINER_SECURITY = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "readOnlyRootFilesystem": True,
}
SETTINGS_SOURCE = {"configMapRef": {"name": "trimtab-settings"}}
CREDENTIALS_SOURCE = {"secretRef": {"name": "trimtab-credentials", "optional": True}}


def list_pod_templates() -> list[tuple[str, dict[str, Any]]]:
    """List the pod templates of all objects, each with its file and group."""
    jobs = [manifest for _, manifest in load_manifests() if manifest["kind"] == "CronJob"]
    templates = [("refresh.yaml", job["spec"]["jobTemplate"]["spec"]["template"]) for job in jobs]
    for name, spec, cluster in list_ray_specs():
        templates.append((f"{name} head", cluster["headGroupSpec"]["template"]))
        templates += [(f"{name} {group['groupName']}", group["template"]) for group in cluster["workerGroupSpecs"]]
        if "submitterPodTemplate" in spec:
            templates.append((f"{name} submitter", spec["submitterPodTemplate"]))
    assert [name for name, _ in templates if name.endswith("submitter")] == ["rayjob.yaml submitter"]
    return templates


def validate_pod(spec: dict[str, Any]) -> None:
    """Validate the spec of a pod against the schema of Kubernetes."""
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": spec}
    kubernetes_validate.validate(pod, KUBERNETES_VERSION, strict=True)


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
    spec = template["spec"]
    validate_pod(spec)
    assert spec["securityContext"] == POD_SECURITY
    # Only the autoscaler, in the pods of heads, calls the Kubernetes API.
    assert spec["automountServiceAccountToken"] is name.endswith("head")
    for container in spec["containers"]:
        assert container["securityContext"] == CONTAINER_SECURITY
        assert {"cpu", "memory"} <= container["resources"]["limits"].keys()
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in spec["volumes"]}
        assert find_empty_mounts(container, spec["volumes"]) == WRITABLE


def find_empty_mounts(container: dict[str, Any], volumes: list[dict[str, Any]]) -> set[str]:
    """Find the folders of a container that are empty volumes on disk when its pod starts."""
    empty = {volume["name"] for volume in volumes if volume.get("emptyDir") == {}}
    return {mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] in empty}


@pytest.mark.parametrize(
    ("name", "spec", "cluster_spec"), list_ray_specs(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_autoscaler_is_valid_and_unprivileged(name, spec, cluster_spec):
    """KubeRay adds this container to the head pod."""
    options, head = cluster_spec["autoscalerOptions"], cluster_spec["headGroupSpec"]["template"]["spec"]
    container = {"name": "autoscaler", "image": "x", **{key: options[key] for key in ("securityContext", "volumeMounts")}}
    validate_pod(head | {"containers": [*head["containers"], container]})
    assert cluster_spec["enableInTreeAutoscaling"] is True
    assert container["securityContext"] == CONTAINER_SECURITY
    assert find_empty_mounts(container, head["volumes"]) == WRITABLE


@pytest.mark.parametrize(
    ("name", "template"), list_pod_templates(), ids=lambda value: value if isinstance(value, str) else "pod"
)
def test_container_reads_settings_and_only_ray_reads_credentials(name, template):
    for container in template["spec"]["containers"]:
        assert "env" not in container
        sources = [SETTINGS_SOURCE] if name.endswith("submitter") else [SETTINGS_SOURCE, CREDENTIALS_SOURCE]
        assert container["envFrom"] == sources


def test_settings_equal_defaults_of_the_library():
    manifest = dict(load_manifests())["settings.yaml"]
    assert manifest["metadata"]["name"] == SETTINGS_SOURCE["configMapRef"]["name"]
    places = {"MLFLOW_TRACKING_URI": "http://mlflow:5000", "TRIMTAB_HOME": "/shared/trimtab"}
    assert manifest["data"] == {**DEFAULTS, RETRY_ON: HAPROXY_OPTIONS, **places}


def test_submitter_leaves_its_command_to_kuberay():
    """KubeRay adds the command only if there is none, and does not change the restart policy."""
    template = dict(load_manifests())["rayjob.yaml"]["spec"]["submitterPodTemplate"]
    assert template["metadata"] == {"labels": SUBMITTER}
    assert template["spec"]["restartPolicy"] == "Never"
    (container,) = template["spec"]["containers"]
    assert not {"command", "args"} & container.keys()
    assert container["image"] == "trimtab:cpu"


def test_clusters_require_token_authentication():
    clusters = [cluster for _, _, cluster in list_ray_specs()]
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


def test_refresh_is_a_valid_command_with_access_to_mlflow():
    template = dict(load_manifests())["refresh.yaml"]["spec"]["jobTemplate"]["spec"]["template"]
    assert template["metadata"]["labels"] == {"trimtab.mlflow-client": "true"}
    command = template["spec"]["containers"][0]["args"]
    assert command[0] == "trimtab"
    main.check_arguments(command[1:])
