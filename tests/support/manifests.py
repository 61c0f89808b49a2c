"""Kubernetes manifests of the deployment folder."""

from typing import Any

import yaml

from tests.support import ROOT

DEPLOY = ROOT / "deploy"
MANIFESTS = sorted((DEPLOY / "kuberay").glob("*.yaml"))
KUBERNETES_VERSION = "1.31"
# Fields of KubeRay's v1 objects that the manifests may use. Kubernetes drops unknown fields without an error.
CLUSTER_FIELDS = {
    "authOptions": {"mode", "secretName"},
    "autoscalerOptions": {
        "env",
        "envFrom",
        "idleTimeoutSeconds",
        "imagePullPolicy",
        "resources",
        "securityContext",
        "upscalingMode",
        "version",
        "volumeMounts",
    },
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
        "submitterPodTemplate": {"metadata", "spec"},
        "ttlSecondsAfterFinished": None,
    },
    "RayService": {"rayClusterConfig": CLUSTER_FIELDS, "serveConfigV2": None, "upgradeStrategy": None},
}
# Folders that a container can write to although its root file system is read-only.
WRITABLE = {"/tmp", "/home/trimtab"}
# Label of the pod that submits the job of a RayJob.
SUBMITTER = {"trimtab.submitter": "true"}


def load_manifests() -> list[tuple[str, dict[str, Any]]]:
    """Load all objects of the manifests, each with its file name."""
    manifests = [(path.name, manifest) for path in MANIFESTS for manifest in yaml.safe_load_all(path.read_text())]
    kinds = {"ConfigMap", "CronJob", "NetworkPolicy", "PersistentVolumeClaim"}
    assert {manifest["kind"] for _, manifest in manifests} == {*SPEC_FIELDS, *kinds}
    return manifests


def list_ray_specs() -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """List the specs of the KubeRay objects, each with its file and the spec of its cluster."""
    return [
        (name, spec := manifest["spec"], spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec)
        for name, manifest in load_manifests()
        if manifest["kind"] in SPEC_FIELDS
    ]
