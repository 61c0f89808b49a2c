"""Autoscaling with the worker groups of cluster.yaml, on Ray's simulated node provider."""

import json
import os
import subprocess
import sys

import pytest
import yaml

from tests.support import ROOT
from tests.support.ray_head import start_ray_head
from trimtab.util import ports

WAIT_SECONDS = 180
EMPTY_LISTS = ("cluster_synced_files", "rsync_exclude", "rsync_filter", "initialization_commands", "setup_commands")
EMPTY_LISTS += ("head_setup_commands", "worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands")
# Runs a task without and one with a GPU; prints the node type of each, and the number of nodes before and after.
DRIVER_SCRIPT = """
import json, os, sys
import ray

ray.init(sys.argv[1], log_to_driver=False)
count_alive = lambda: len([node for node in ray.nodes() if node["Alive"]])
before = count_alive()
node_type = lambda: os.environ["RAY_NODE_TYPE_NAME"]
types = [ray.get(ray.remote(node_type).options(num_cpus=1, num_gpus=gpus).remote()) for gpus in (0, 1)]
print(json.dumps({"before": before, "types": types, "after": count_alive()}))
"""


def build_simulated_config(port: int) -> dict:
    """Return the limits of cluster.yaml, and its groups with the resources of their machine types."""
    config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    resources = {"gpu": {"CPU": 2, "GPU": 1}, "cpu": {"CPU": 2}}
    types = {
        name: {"resources": resources[name], "node_config": {}} | {key: group[key] for key in ("min_workers", "max_workers")}
        for name, group in config["available_node_types"].items()
        if name != config["head_node_type"]
    }
    types["ray.head.default"] = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
    provider = {"type": "fake_multinode", "gcs_address": f"127.0.0.1:{port}", "use_node_id_as_ip": True}
    provider |= {"disable_node_updaters": True, "disable_launch_config_check": True}
    simulated = {key: config[key] for key in ("cluster_name", "max_workers", "idle_timeout_minutes")}
    simulated |= {"provider": provider, "auth": {}, "available_node_types": types, "head_node_type": "ray.head.default"}
    # Simulated nodes need no setup.
    simulated |= {"docker": {}, "file_mounts": {}, "upscaling_speed": 1.0, "file_mounts_sync_continuously": False}
    return simulated | {name: [] for name in EMPTY_LISTS}


@pytest.mark.slow
def test_workers_start_in_the_group_that_matches_the_request(tmp_path):
    port = ports.find_free_ports()[0]
    (tmp_path / "fake.yaml").write_text(json.dumps(build_simulated_config(port)))
    authentication = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 32}
    simulation = {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    flags = ["--num-cpus", "0", "--num-gpus", "0", "--autoscaling-config", str(tmp_path / "fake.yaml")]
    with start_ray_head(port, *flags, environment=simulation | authentication, dashboard=False) as ray_head:
        command = [sys.executable, "-c", DRIVER_SCRIPT, ray_head.address]
        completed = subprocess.run(
            command, env=os.environ | authentication, capture_output=True, text=True, timeout=WAIT_SECONDS, check=False
        )
    assert completed.returncode == 0, completed.stderr
    assert json.loads(completed.stdout.splitlines()[-1]) == {"before": 1, "types": ["cpu", "gpu"], "after": 3}
