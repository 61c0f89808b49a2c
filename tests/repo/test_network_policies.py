"""Network policies of the Kubernetes manifests."""

from ipaddress import ip_address, ip_network
from typing import Any

import pytest

from tests.support.manifests import SUBMITTER, load_manifests

PORTS = {53, 80, 443, 5000, 6379, 6443, 8000, 8265}
RAY, MLFLOW = {"ray.io/cluster": "trimtab"}, {"app": "mlflow"}
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
