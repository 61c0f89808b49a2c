"""Where things are on this machine: all of it comes from the environment, with defaults that need no set-up."""

import os
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

# What a home holds that was downloaded, or made of a download.
DOWNLOADED = ("assets", "models", "wheels", "engine")


def get_home() -> Path:
    """Folder of everything trimtab keeps: `TRIMTAB_HOME`, else `trimtab` in the user's cache folder. Made on demand."""
    configured = os.environ.get("TRIMTAB_HOME")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(configured).expanduser() if configured else cache / "trimtab"
    folder.mkdir(parents=True, exist_ok=True)
    return folder.resolve()


def link_downloads(folder: Path) -> None:
    """Link what was downloaded into `folder`, a home to be: it fetches nothing again; its runs and registry are its own."""
    for name in DOWNLOADED:
        (get_home() / name).mkdir(exist_ok=True)
        (folder / name).symlink_to(get_home() / name)


def get_tracking_uri() -> str:
    """MLflow store: `MLFLOW_TRACKING_URI`, else a SQLite file under `home()`."""
    configured = os.environ.get("MLFLOW_TRACKING_URI")
    if configured:
        return configured
    folder = get_home() / "mlflow"
    folder.mkdir(exist_ok=True)
    return f"sqlite:///{folder / 'mlflow.db'}"


def get_shown_uri() -> str:
    """The MLflow store for people and logs: without the password that its address may hold."""
    parts = urlsplit(get_tracking_uri())
    if "@" not in parts.netloc:
        return get_tracking_uri()
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def get_runs_folder() -> Path:
    """Folder of job checkpoints and reports on this machine. Made on demand."""
    folder = get_home() / "runs"
    folder.mkdir(exist_ok=True)
    return folder


# Read by Ray, Serve, vLLM and MLflow: no telemetry, few words, no upload of the folder that `uv run` starts in, seconds
# instead of minutes for an MLflow that is away, and Serve's HAProxy path, which keeps vLLM's own speed. What the user has
# set stays.
DEFAULTS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    # A submitted job has variables of its own, and hands these on beside them.
    "RAY_OVERRIDE_JOB_RUNTIME_ENV": "1",
    # Requests that run are waited for in any case; this is for load balancers in front, and kept every stop waiting.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    # HAProxy can retry only a request that fits into its buffer (see ray_patches.patch_haproxy_options).
    "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": str(128 << 10),
    # A proxy that died is looked for three times before it is started again, by default ten seconds apart.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
    # A proxy on a busy machine of two cores takes longer than Serve's 5 seconds to come up.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "60",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    # A worker that reports waits until Train looks at it, by default every two seconds: with each checkpoint, then.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_V2_ENABLED": "1",
    # Where a node died, Train may still count on its cores, and asks for them so long before it looks again at what is there.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
# How Serve's HAProxy chooses a replica.
BALANCE = "RAY_SERVE_HAPROXY_BALANCE_ALGORITHM"
# Where Serve's HAProxy tells its metrics and shows its state.
PROXY_PORTS = ("RAY_SERVE_HAPROXY_METRICS_PORT", "RAY_SERVE_HAPROXY_STATS_PORT")
PASSED_ON = (
    *DEFAULTS,
    BALANCE,
    "RAY_SERVE_HAPROXY_RETRY_ON",
    "TRIMTAB_HOME",
    "TRIMTAB_CATALOGUE",
    "MLFLOW_TRACKING_URI",
    "HF_HOME",
    "HF_HUB_OFFLINE",
)


def prepare_environment() -> dict[str, str]:
    """Set the defaults in this process; returns what processes that Ray starts elsewhere are to get."""
    for key, value in DEFAULTS.items():
        os.environ.setdefault(key, value)
    return {key: os.environ[key] for key in PASSED_ON if key in os.environ}
