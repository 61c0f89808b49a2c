"""The Serve application: what `trimtab serve` runs, and what `serve deploy` takes as `trimtab.serve.app:build`."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from ray import serve

from trimtab import base as bases
from trimtab import cli
from trimtab.base import BaseModel

from . import keys
from .config import ServeConfig
from .replica import Replica, build_app


def build(args: Mapping[str, Any]) -> Any:
    """The application of a config file's `args`: the fields of `trimtab serve`. Raises UsageError for what they do not know."""
    config = cli.build(ServeConfig, args, "args")
    config = replace(config, key_file=keys.required(config))
    return application(config, bases.resolve(config.model, config.revision), config.cpus or 1.0)


def application(config: ServeConfig, base: BaseModel, cpus: float) -> Any:
    """One deployment of replicas, each with an engine and so many `cpus`."""
    deployment: Any = serve.deployment(
        serve.ingress(build_app)(Replica),
        name="engine",
        num_replicas=config.replicas,
        ray_actor_options={"num_cpus": cpus, "num_gpus": config.gpus},
        max_ongoing_requests=config.requests,
        max_queued_requests=config.queue,
        health_check_period_s=10,
        health_check_timeout_s=60,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=20,
        user_config={key: asdict(config)[key] for key in ("traffic", "shadow")},
    )
    return deployment.bind(base, config)
