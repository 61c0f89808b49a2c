"""cluster.yaml's groups of workers on Ray's provider of nodes that are processes, in the place of a cloud."""

import json
import os
import subprocess
import sys

import pytest
import yaml

from tests.support import ROOT
from tests.support.ray_head import head
from trimtab.util import ports

WAIT_SECONDS = 180
NOTHING = ("cluster_synced_files", "rsync_exclude", "rsync_filter", "initialization_commands", "setup_commands")
NOTHING += ("head_setup_commands", "worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands")
# Work for a worker without a GPU, and for one with: where it ran, and how many nodes there were before and after.
ASKS = """
import json, os, sys
import ray

ray.init(sys.argv[1], log_to_driver=False)
alive = lambda: len([node for node in ray.nodes() if node["Alive"]])
before = alive()
where = lambda: os.environ["RAY_NODE_TYPE_NAME"]
on = [ray.get(ray.remote(where).options(num_cpus=1, num_gpus=gpus).remote()) for gpus in (0, 1)]
print(json.dumps({"before": before, "on": on, "after": alive()}))
"""


def simulated(port: int) -> dict:
    """The cluster's limits, and its groups with the resources that their machines would have."""
    config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    has = {"gpu": {"CPU": 2, "GPU": 1}, "cpu": {"CPU": 2}}
    types = {
        name: {"resources": has[name], "node_config": {}} | {key: group[key] for key in ("min_workers", "max_workers")}
        for name, group in config["available_node_types"].items()
        if name != config["head_node_type"]
    }
    types["ray.head.default"] = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
    provider = {"type": "fake_multinode", "gcs_address": f"127.0.0.1:{port}", "use_node_id_as_ip": True}
    provider |= {"disable_node_updaters": True, "disable_launch_config_check": True}
    made = {key: config[key] for key in ("cluster_name", "max_workers", "idle_timeout_minutes")}
    made |= {"provider": provider, "auth": {}, "available_node_types": types, "head_node_type": "ray.head.default"}
    # Nothing is set up on simulated nodes.
    made |= {"docker": {}, "file_mounts": {}, "upscaling_speed": 1.0, "file_mounts_sync_continuously": False}
    return made | {name: [] for name in NOTHING}


@pytest.mark.slow
def test_workers_come_from_the_group_that_work_asks_for(tmp_path):
    port = ports.find_free_ports()[0]
    (tmp_path / "fake.yaml").write_text(json.dumps(simulated(port)))
    secret = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 32}
    fake = {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    flags = ["--num-cpus", "0", "--num-gpus", "0", "--autoscaling-config", str(tmp_path / "fake.yaml")]
    with head(port, *flags, environment=fake | secret, dashboard=False) as up:
        command = [sys.executable, "-c", ASKS, up.address]
        done = subprocess.run(
            command, env=os.environ | secret, capture_output=True, text=True, timeout=WAIT_SECONDS, check=False
        )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {"before": 1, "on": ["cpu", "gpu"], "after": 3}
