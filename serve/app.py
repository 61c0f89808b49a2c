"""The Serve application: what `trimtab serve` runs, and what `serve deploy` takes as `trimtab.serve.app:build_app`."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import ray
from ray import serve
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
from ray.serve.config import AutoscalingConfig

from trimtab.cli import main
from trimtab.model.base_model import BaseModel, resolve_base_model
from trimtab.ray_patches import patch_replica_address
from trimtab.serve.api_keys import get_required_key_file
from trimtab.serve.config import ServeConfig
from trimtab.serve.registry.coordinator import VersionCoordinator
from trimtab.serve.replica import Replica, get_asgi_app

# Requests beyond the door's: those that look at pages and metrics, and those that are turned down.
SPARE = 256


def build_app(args: Mapping[str, Any]) -> Any:
    """The application of a config file's `args`: the fields of `trimtab serve`. Raises UsageError for what they do not know."""
    config = main.build_settings(ServeConfig, args, "args")
    for host in (config.host, *_listening()):
        config = replace(config, key_file=get_required_key_file(replace(config, host=host)))
    return build_application(config, resolve_base_model(config.model, config.revision), config.cpus or 1.0)


def build_application(config: ServeConfig, base: BaseModel, cpus: float) -> Any:
    """One deployment of replicas, each with an engine and so many `cpus`; beside several, what they agree by."""
    most = max(config.replicas, config.most_replicas)
    deployment: Any = serve.deployment(
        serve.ingress(get_asgi_app)(Replica),
        name="engine",
        ray_actor_options={"num_cpus": cpus, "num_gpus": config.gpus},
        # What is too much is turned down by the replica's own door, in the API's words; this is for the rest.
        max_ongoing_requests=config.requests + config.queue + SPARE,
        max_queued_requests=SPARE,
        health_check_period_s=2,
        health_check_timeout_s=60,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=config.drain_seconds,
        user_config={key: asdict(config)[key] for key in ("traffic", "shadow")},
    )
    if most > config.replicas:
        scale = AutoscalingConfig(
            min_replicas=config.replicas,
            max_replicas=most,
            target_ongoing_requests=config.target_requests,
            upscale_delay_s=config.up_seconds,
            downscale_delay_s=config.down_seconds,
        )
        deployment = deployment.options(autoscaling_config=scale)
    else:
        deployment = deployment.options(num_replicas=config.replicas)
    return deployment.bind(base, config, coordinator_deployment.bind() if most > 1 else None)


def _listening() -> list[str]:
    """The address of the Serve that builds the application, which a config file gives apart from `args`."""
    if not ray.is_initialized():
        return []
    try:
        controller = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    except ValueError:
        return []
    options: Any = ray.get(controller.get_http_config.remote())
    return [options.host or "127.0.0.1"]


class LocalCoordinator(VersionCoordinator):
    """The same, kept to this machine as the other replicas are."""

    def __init__(self) -> None:
        patch_replica_address()
        super().__init__()


coordinator_deployment: Any = serve.deployment(LocalCoordinator, name="agreement", ray_actor_options={"num_cpus": 0})
