"""Environment settings: folders, the MLflow store and defaults for the libraries."""

import getpass
import os
import stat
import tempfile
from pathlib import Path
from urllib.parse import unquote, urlsplit, urlunsplit

from trimtab.errors import UsageError

# Folders of a home whose contents are downloaded or derived from downloads.
DOWNLOADED = ("assets", "models", "wheels", "engine")


def get_home() -> Path:
    """Return the folder of all trimtab data, created on demand.

    The folder is `TRIMTAB_HOME` if it is set, else `trimtab` in the user's cache folder.
    """
    configured = os.environ.get("TRIMTAB_HOME")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(configured).expanduser() if configured else cache / "trimtab"
    folder.mkdir(parents=True, exist_ok=True)
    return folder.resolve()


def link_downloads(folder: Path) -> None:
    """Link the downloaded folders of the current home into another home.

    The other home then downloads nothing again, but has its own runs and registry.

    Args:
        folder: existing folder that becomes a home.
    """
    for name in DOWNLOADED:
        (get_home() / name).mkdir(exist_ok=True)
        (folder / name).symlink_to(get_home() / name)


def get_tracking_uri() -> str:
    """Return the URI of the MLflow store: `MLFLOW_TRACKING_URI` if it is set, else a SQLite file in the home folder."""
    configured = os.environ.get("MLFLOW_TRACKING_URI")
    if configured:
        return _make_absolute(configured)
    folder = get_home() / "mlflow"
    folder.mkdir(exist_ok=True)
    return f"sqlite:///{folder / 'mlflow.db'}"


def _make_absolute(uri: str) -> str:
    """Return the URI of an SQLite store with an absolute path, and any other URI as it is.

    Ray starts processes in folders of their own, in which a relative path names another file.
    """
    scheme, separator, path = uri.partition(":///")
    if separator and scheme.startswith("sqlite") and path and not path.startswith(("/", ":memory:")):
        return f"{scheme}:///{Path(path).resolve()}"
    return uri


def get_private_folder() -> Path:
    """Return the folder for sockets and logs of Ray and HAProxy, which only this user may enter; created on demand.

    It is in `RAY_TMPDIR` or the temporary folder of the system. Ray's logs contain the environment of its processes, and
    HAProxy's socket controls the server.

    Raises:
        UsageError: if another user has created it.
    """
    folder = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()) / f"trimtab-{os.getuid()}"
    folder.mkdir(mode=stat.S_IRWXU, parents=True, exist_ok=True)
    info = folder.lstat()
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid():
        raise UsageError(f"the temporary folder {folder} belongs to another user. Set RAY_TMPDIR to a folder of your own")
    folder.chmod(stat.S_IRWXU)
    return folder


def build_key_header(key: str | None) -> dict[str, str]:
    """Return the header with an API key, by default that in TRIMTAB_API_KEY; no header without a key."""
    key = key or os.environ.get("TRIMTAB_API_KEY")
    return {"authorization": f"Bearer {key}"} if key else {}


def get_user_name() -> str:
    """Return the name of the user who runs this process, or the number of one without a name, as in many containers."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def get_shown_uri() -> str:
    """Return the URI of the MLflow store for output and logs, without user name and password."""
    parts = urlsplit(get_tracking_uri())
    if "@" not in parts.netloc:
        return get_tracking_uri()
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def get_runs_folder() -> Path:
    """Return the local folder of job checkpoints and reports, created on demand."""
    folder = get_home() / "runs"
    folder.mkdir(exist_ok=True)
    return folder


# Defaults for Ray, Serve, vLLM and MLflow: no telemetry, little output, no upload of the working folder of `uv run`, short
# timeouts for an unreachable MLflow server, and Serve's HAProxy ingress, which keeps the throughput of vLLM.
DEFAULTS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    # Merge these with the variables of a submitted job; otherwise Ray rejects the conflict.
    "RAY_OVERRIDE_JOB_RUNTIME_ENV": "1",
    # By default, Serve's controller runs ten times a second, and each replica and proxy exports its metrics as often.
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "1",
    "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "5000",
    # The minimum only serves external load balancers and delays every stop. Running requests are drained in any case.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    # HAProxy can retry only a request that fits into its buffer (see ray_patches.patch_haproxy_options).
    "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": str(128 << 10),
    # Serve restarts a dead proxy after three failed health checks, by default ten seconds apart.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
    # On a busy machine with two cores, a proxy needs longer to start than Serve's default of 5 seconds.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "60",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    # A worker that reports a checkpoint blocks until Train polls it, by default every two seconds.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_V2_ENABLED": "1",
    # After a node failure, Train may request the lost cores; it reads the available resources again after this timeout.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
# Load-balancing algorithm of Serve's HAProxy.
BALANCE = "RAY_SERVE_HAPROXY_BALANCE_ALGORITHM"
# Files and folders of Serve's HAProxy, by default in a folder of /tmp that all users of a machine share.
PROXY_FILES = {
    "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": "haproxy.cfg",
    "RAY_SERVE_HAPROXY_SOCKET_PATH": "admin.sock",
    "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": "metrics.sock",
    "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": "",
    "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": "server-state",
}
# Ports of the metrics and the statistics page of Serve's HAProxy.
PROXY_PORTS = (
    "RAY_SERVE_HAPROXY_METRICS_PORT",
    "RAY_SERVE_HAPROXY_STATS_PORT",
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT",
    "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT",
)
PASSED_ON = (
    *DEFAULTS,
    BALANCE,
    "RAY_SERVE_HAPROXY_RETRY_ON",
    "TRIMTAB_HOME",
    "TRIMTAB_CATALOGUE",
    "MLFLOW_TRACKING_URI",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "NO_PROXY",
    "no_proxy",
)
# Hosts of this machine, which no proxy can reach.
LOOPBACK = ("localhost", "127.0.0.1", "::1")


def prepare_environment() -> dict[str, str]:
    """Set the default environment variables in this process; variables that the user has set keep their values.

    Returns:
        The variables to pass to processes that Ray starts on other machines.
    """
    for key, value in DEFAULTS.items():
        os.environ.setdefault(key, value)
    _exclude_loopback_from_proxies()
    # Libraries ask for the user's name as well, and raise KeyError without one.
    os.environ.setdefault("USER", get_user_name())
    if configured := os.environ.get("MLFLOW_TRACKING_URI"):
        os.environ["MLFLOW_TRACKING_URI"] = _separate_credentials(_make_absolute(configured))
    return {key: os.environ[key] for key in PASSED_ON if key in os.environ}


def _separate_credentials(uri: str) -> str:
    """Move user name and password of an HTTP address into MLflow's variables for them, and return the address without them.

    Ray writes the variables that it passes on into logs and shows them on its dashboard.
    """
    parts = urlsplit(uri)
    if not parts.scheme.startswith("http") or "@" not in parts.netloc:
        return uri
    for variable, value in (("MLFLOW_TRACKING_USERNAME", parts.username), ("MLFLOW_TRACKING_PASSWORD", parts.password)):
        os.environ[variable] = unquote(value or "")
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _exclude_loopback_from_proxies() -> None:
    """Add the loopback hosts to NO_PROXY if a proxy is set: servers of this machine are not behind it."""
    names = [f"{scheme}_proxy" for scheme in ("http", "https", "all")]
    if not any(os.environ.get(name) or os.environ.get(name.upper()) for name in names):
        return
    hosts = [host for name in ("NO_PROXY", "no_proxy") for host in os.environ.get(name, "").split(",") if host]
    # Both spellings, because libraries differ in which one they read.
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = ",".join(dict.fromkeys([*hosts, *LOOPBACK]))
