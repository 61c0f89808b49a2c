"""Deployment files: Kubernetes manifests, network policies, image, build context, compose file of MLflow, and cluster file."""

import copy
import os
import re
import shlex
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from ipaddress import ip_address, ip_network
from pathlib import Path, PurePosixPath
from typing import Any

import botocore.session
import kubernetes_validate
import pytest
import ray
import yaml
from botocore.validate import ParamValidator
from ray.serve.schema import ServeDeploySchema
from sqlalchemy.engine import make_url

from tests.support import ROOT
from trimtab.cli import main
from trimtab.ray_patches import HAPROXY_OPTIONS, RETRY_ON
from trimtab.serve.config import ServeConfig
from trimtab.settings import DEFAULTS

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
POD_SECURITY = {"runAsNonRoot": True, "runAsUser": 1000, "fsGroup": 1000, "seccompProfile": {"type": "RuntimeDefault"}}
CONTAINER_SECURITY = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "readOnlyRootFilesystem": True,
}
# Folders that a container can write to although its root file system is read-only.
WRITABLE = {"/tmp", "/home/trimtab"}
SETTINGS_SOURCE = {"configMapRef": {"name": "trimtab-settings"}}
CREDENTIALS_SOURCE = {"secretRef": {"name": "trimtab-credentials", "optional": True}}


def load_manifests() -> list[tuple[str, dict[str, Any]]]:
    """Load all objects of the manifests, each with its file name."""
    manifests = [(path.name, manifest) for path in MANIFESTS for manifest in yaml.safe_load_all(path.read_text())]
    kinds = {"ConfigMap", "NetworkPolicy", "PersistentVolumeClaim"}
    assert {manifest["kind"] for _, manifest in manifests} == {*SPEC_FIELDS, *kinds}
    return manifests


def list_ray_specs() -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """List the specs of the KubeRay objects, each with its file and the spec of its cluster."""
    return [
        (name, spec := manifest["spec"], spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec)
        for name, manifest in load_manifests()
        if manifest["kind"] in SPEC_FIELDS
    ]


def list_pod_templates() -> list[tuple[str, dict[str, Any]]]:
    """List the pod templates of all KubeRay objects, each with its file and group."""
    templates: list[tuple[str, dict[str, Any]]] = []
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
    ("name", "spec", "cluster"), list_ray_specs(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_autoscaler_is_valid_and_unprivileged(name, spec, cluster):
    """KubeRay adds this container to the head pod."""
    options, head = cluster["autoscalerOptions"], cluster["headGroupSpec"]["template"]["spec"]
    container = {"name": "autoscaler", "image": "x", **{key: options[key] for key in ("securityContext", "volumeMounts")}}
    validate_pod(head | {"containers": [*head["containers"], container]})
    assert cluster["enableInTreeAutoscaling"] is True
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


PORTS = {53, 80, 443, 5000, 6379, 6443, 8000, 8265}
RAY, SUBMITTER, MLFLOW = {"ray.io/cluster": "trimtab"}, {"trimtab.submitter": "true"}, {"app": "mlflow"}
# Pods that each network policy selects, and its direction.
POLICIES = {"trimtab-ray": (RAY, "ingress"), "trimtab-ray-egress": (RAY, "egress"), "trimtab-mlflow": (MLFLOW, "ingress")}
# Pods of the namespace by their labels, pods of other namespaces by the name of the namespace, other hosts by their address.
Peer = dict[str, str] | str


def load_policies() -> dict[str, dict[str, Any]]:
    """Load the specs of the network policies by name."""
    return {
        manifest["metadata"]["name"]: manifest["spec"]
        for _, manifest in load_manifests()
        if manifest["kind"] == "NetworkPolicy"
    }


def list_allowed_ports(name: str, peer: Peer, protocol: str) -> set[int]:
    """List those of PORTS at which a network policy allows connections from or to a peer."""
    direction = POLICIES[name][1]
    allowed: set[int] = set()
    for rule in load_policies()[name][direction]:
        if any(matches_peer(entry, peer) for entry in rule["from" if direction == "ingress" else "to"]):
            allowed |= {entry["port"] for entry in rule["ports"] if entry["protocol"] == protocol} if "ports" in rule else PORTS
    return allowed


def matches_peer(entry: dict[str, Any], peer: Peer) -> bool:
    """Return whether an entry of a rule, which has one selector, includes a peer."""
    ((kind, selector),) = entry.items()
    if isinstance(peer, dict):
        return kind == "podSelector" and matches_labels(selector, peer)
    if not peer[0].isdigit():
        return kind == "namespaceSelector" and matches_labels(selector, {"kubernetes.io/metadata.name": peer})
    if kind != "ipBlock":
        return False
    address, excluded = ip_address(peer), map(ip_network, selector["except"])
    return address in ip_network(selector["cidr"]) and not any(address in network for network in excluded)


def matches_labels(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    """Return whether labels match a selector."""
    assert all(expression["operator"] == "Exists" for expression in selector.get("matchExpressions", []))
    return selector.get("matchLabels", {}).items() <= labels.items() and all(
        expression["key"] in labels for expression in selector.get("matchExpressions", [])
    )


@pytest.mark.parametrize(
    ("name", "peer", "ports"),
    [
        ("trimtab-ray", RAY, PORTS),
        ("trimtab-ray", SUBMITTER, {8265}),
        ("trimtab-ray", {"batch.kubernetes.io/job-name": "x"}, set()),
        ("trimtab-ray", {"trimtab.client": "true"}, {8000}),
        ("trimtab-ray", {"trimtab.mlflow-client": "true"}, set()),
        ("trimtab-ray", MLFLOW, set()),
        ("trimtab-ray", "kuberay-system", {8000, 8265}),
        ("trimtab-ray", "default", set()),
        ("trimtab-ray", "10.0.0.1", set()),
        ("trimtab-ray-egress", RAY, PORTS),
        ("trimtab-ray-egress", MLFLOW, {5000}),
        ("trimtab-ray-egress", {"app": "other"}, set()),
        ("trimtab-ray-egress", "kube-system", {53}),
        ("trimtab-ray-egress", "default", set()),
        ("trimtab-ray-egress", "203.0.113.1", {443, 6443}),
        ("trimtab-ray-egress", "169.254.169.254", set()),
        ("trimtab-mlflow", RAY, {5000}),
        ("trimtab-mlflow", {"trimtab.mlflow-client": "true"}, {5000}),
        ("trimtab-mlflow", {"trimtab.client": "true"}, set()),
        ("trimtab-mlflow", "kuberay-system", set()),
    ],
)
def test_network_policy_allows_only_listed_ports(name, peer, ports):
    assert list_allowed_ports(name, peer, "TCP") == ports
    # Only Ray pods use other protocols with each other, and DNS uses UDP.
    assert list_allowed_ports(name, peer, "UDP") == (ports if ports == PORTS or peer == "kube-system" else set())


def test_network_policies_select_all_ray_and_mlflow_pods():
    policies = load_policies()
    assert policies.keys() == POLICIES.keys()
    for name, (labels, direction) in POLICIES.items():
        assert policies[name]["policyTypes"] == [direction.title()]
        assert matches_labels(policies[name]["podSelector"], labels)
        assert not matches_labels(policies[name]["podSelector"], {"app": "other"})


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


def test_dockerfile_passes_hadolint():
    hadolint = Path(sys.executable).parent / "hadolint"
    result = subprocess.run([hadolint, DEPLOY / "Dockerfile"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    targets = [line.split() for line in (DEPLOY / "Dockerfile").read_text().splitlines() if line.startswith("FROM")]
    assert [words[3] for words in targets] == ["common", "cpu", "gpu"]
    assert (DEPLOY / "Dockerfile").read_text().count("USER 1000") == 2


WILDCARDS = {"**/": "(.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
# Files that must never be in the image, wherever they are.
SECRETS = [".env", "keys.json", "keys.json.lock"]


def is_in_context(path: str, rules: str) -> bool:
    """Return whether a file is in a build context with these rules of a .dockerignore file.

    The last rule that matches the file or one of its folders decides. A pattern begins at the root of the context, unlike in
    .gitignore. Character classes are not supported.
    """
    included = True
    for rule in rules.splitlines():
        if rule and not rule.startswith("#"):
            parts = re.split(r"(\*\*/|\*\*|\*|\?)", rule.removeprefix("!").strip("/"))
            pattern = re.compile("".join(WILDCARDS.get(part, re.escape(part)) for part in parts))
            if any(pattern.fullmatch(str(part)) for part in (PurePosixPath(path), *PurePosixPath(path).parents)):
                included = rule.startswith("!")
    return included


@pytest.mark.parametrize(
    ("rules", "path", "included"),
    [
        ("*/temp*", "folder/temporary.txt", False),
        ("*/temp*", "folder/sub/temporary.txt", True),
        ("*/*/temp*", "folder/sub/temp", False),
        ("temp?", "tempa/file", False),
        ("temp?", "temp/file", True),
        ("**/*.go", "main.go", False),
        ("**/*.go", "a/b/main.go", False),
        ("*.md\n!README.md", "README.md", True),
        ("*.md\n!README.md", "docs/README.md", True),
        ("*.md\n!README*.md\nREADME-secret.md", "README-secret.md", False),
        ("*\n!a\n**/b", "a/c/d", True),
        ("*\n!a\n**/b", "a/b/c", False),
        ("*\n!a\n**/b", "e/a", False),
    ],
)
def test_dockerignore_rules_have_docker_semantics(rules, path, included):
    """Examples of Docker's documentation, and re-included folders."""
    assert is_in_context(path, rules) is included


def list_context() -> set[str]:
    """List the files of the checkout that are in the build context of the image."""
    rules, files = (DEPLOY / "Dockerfile.dockerignore").read_text(), set[str]()
    for folder, names, members in os.walk(ROOT):
        # The packages in it are too many to list; the rules exclude the whole folder.
        names[:] = [name for name in names if name != ".venv"]
        files |= {(Path(folder) / member).relative_to(ROOT).as_posix() for member in members}
    return {file for file in files if is_in_context(file, rules)}


def list_wheel_files() -> set[str]:
    """List the files that setuptools reads for the wheel."""
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project, tool = config["project"], config["tool"]["setuptools"]
    files = {ROOT / "pyproject.toml", ROOT / project["readme"], *(ROOT / name for name in project["license-files"])}
    for package in tool["packages"]:
        base = max((name for name in tool["package-dir"] if f"{package}.".startswith(f"{name}.")), key=len)
        folder = ROOT / tool["package-dir"][base] / package.removeprefix(base).strip(".").replace(".", "/")
        patterns = ["*.py", *tool["package-data"].get(package, [])]
        found = [set(folder.glob(pattern)) for pattern in patterns]
        assert all(found), f"{package}: a pattern matches no file"
        files.update(*found)
    return {file.relative_to(ROOT).as_posix() for file in files}


def test_build_context_has_all_files_of_the_wheel():
    context = list_context()
    assert list_wheel_files() - context == set()
    copied = re.findall(r"^COPY (\S+)", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    assert set(copied) - {"."} <= context
    assert len(list_wheel_files()) > 200


def test_build_context_has_no_secrets_tests_or_git_files():
    allowed = {"LICENSE", "README.md", "jobs", "locks", "platform", "pyproject.toml", "serve"}
    context = list_context()
    assert {file.partition("/")[0] for file in context} == allowed
    assert [file for file in context if file.endswith((".pyc", *SECRETS))] == []
    rules = (DEPLOY / "Dockerfile.dockerignore").read_text()
    folders = ("", "serve/", "platform/trimtab/data/", "deploy/mlflow/", "tests/")
    absent = [folder + name for folder in folders for name in SECRETS]
    absent += [".git/config", ".venv/pyvenv.cfg", "jobs/__pycache__/commands.pyc", "platform/trimtab.egg-info/PKG-INFO"]
    absent += ["id_ed25519", "credentials.json", "tests/conftest.py", "bench/soak.py", "mlflow.db", "mlruns/0/meta.yaml"]
    assert [path for path in absent if is_in_context(path, rules)] == []


@pytest.mark.parametrize("path", ["deploy/mlflow/.env", "keys.json", "keys.json.lock"])
def test_secrets_in_the_checkout_go_nowhere(path):
    """Neither into a commit, nor into the image, nor to the nodes of a cluster."""
    commits = (ROOT / ".gitignore").read_text().splitlines()
    nodes = yaml.safe_load((ROOT / "cluster.yaml").read_text())["rsync_exclude"]
    for patterns in (commits, nodes):
        assert any(fnmatch(Path(path).name, pattern.removeprefix("**/")) for pattern in patterns)
    assert not is_in_context(path, (DEPLOY / "Dockerfile.dockerignore").read_text())


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
