"""Ray Serve application of `trimtab serve`, and of `serve deploy` as `trimtab.serve.app:build_app`."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import ray
from ray import serve
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
from ray.serve.config import AutoscalingConfig

from trimtab import settings
from trimtab.cli import main
from trimtab.model.base_model import BaseModel, resolve_base_model
from trimtab.ray_patches import patch_replica_address
from trimtab.serve.api_keys import get_required_key_file
from trimtab.serve.config import ServeConfig
from trimtab.serve.registry.coordinator import VersionCoordinator
from trimtab.serve.replica import Replica

# Additional requests beyond the admission limits: pages, metrics, and requests that the middleware rejects.
SPARE = 256


def build_app(args: Mapping[str, Any]) -> Any:
    """Build the application from the `args` of a Serve config file.

    Args:
        args: settings of `trimtab serve` by name.

    Returns:
        The bound Serve application.

    Raises:
        UsageError: if a setting is unknown or invalid, or the server would be open to other machines.
    """
    config = main.build_settings(ServeConfig, args, "args")
    running = get_proxy_address()
    for host in (config.host, *([running[0]] if running else [])):
        config = replace(config, api_key_file=get_required_key_file(replace(config, host=host)))
    return build_application(config, resolve_base_model(config.base, config.revision), config.cpus_per_replica or 1.0)


def build_application(config: ServeConfig, base: BaseModel, cpus: float) -> Any:
    """Build the application: a deployment of replicas, and a version coordinator if there may be several.

    Args:
        config: settings of the server.
        base: base model.
        cpus: CPU cores of each replica.

    Returns:
        The bound Serve application.
    """
    most = max(config.num_replicas, config.max_replicas)
    deployment: Any = serve.deployment(
        serve.ingress()(Replica),
        name="engine",
        ray_actor_options={
            "num_cpus": cpus,
            "num_gpus": config.gpus_per_replica,
            # A caller may have connected to Ray before it set the store, and replicas must read the same registry.
            "runtime_env": {"env_vars": settings.prepare_environment()},
        },
        # The admission middleware rejects excess requests with an OpenAI-style error before this limit is reached.
        max_ongoing_requests=config.max_ongoing_requests + config.max_queued_requests + SPARE,
        max_queued_requests=SPARE,
        health_check_period_s=2,
        health_check_timeout_s=60,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=config.drain_seconds,
        user_config={key: asdict(config)[key] for key in ("traffic", "shadow")},
    )
    if most > config.num_replicas:
        scale = AutoscalingConfig(
            min_replicas=config.num_replicas,
            max_replicas=most,
            target_ongoing_requests=config.target_ongoing_requests,
            upscale_delay_s=config.upscale_delay_s,
            downscale_delay_s=config.downscale_delay_s,
        )
        deployment = deployment.options(autoscaling_config=scale)
    else:
        deployment = deployment.options(num_replicas=config.num_replicas)
    return deployment.bind(base, config, coordinator_deployment.bind() if most > 1 else None)


def get_proxy_address() -> tuple[str, int] | None:
    """Return host and port of the running Serve instance, which a config file sets outside of `args`; None without one."""
    if not ray.is_initialized():
        return None
    try:
        controller = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    except ValueError:
        return None
    options: Any = ray.get(controller.get_http_config.remote())
    return options.host or "127.0.0.1", options.port


class LocalCoordinator(VersionCoordinator):
    """Version coordinator that applies the same address patch as the replicas."""

    def __init__(self) -> None:
        patch_replica_address()
        super().__init__()


coordinator_deployment: Any = serve.deployment(LocalCoordinator, name="agreement", ray_actor_options={"num_cpus": 0})
