"""Network interfaces that a server with the default options listens on."""

import stat
from pathlib import Path

import httpx
import pytest
import ray

from tests.support.sockets import find_public_listeners
from trimtab import settings
from trimtab.errors import UsageError
from trimtab.serve.config import ServeConfig
from trimtab.serve.server import serving
from trimtab.util import ports


def test_only_haproxy_status_ports_are_public(url):
    listeners = find_public_listeners()
    # Two ports with HAProxy's metrics and state, whose address cannot be set: docs/serve.md.
    assert {name for name, _ in listeners} <= {"haproxy"}, listeners
    assert len(set(listeners)) <= 2


def test_second_server_on_the_same_cluster_is_rejected(url):
    """It would replace the first one, perhaps by a server without keys."""
    config = ServeConfig(port=ports.find_free_ports()[0])
    with pytest.raises(UsageError, match=r"has a trimtab server already\. Stop it first"), serving(config):
        pytest.fail("the second server started")
    assert httpx.get(f"{url}/health", timeout=30).status_code == 200


def test_files_of_ray_and_haproxy_are_for_this_user_only(url):
    """Ray's logs contain the environment of its processes, and HAProxy's socket controls the server."""
    folder = settings.get_private_folder()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert Path(ray._private.worker.global_worker.node.get_session_dir_path()).is_relative_to(folder)
    assert list((folder / "haproxy").rglob("*.sock"))
