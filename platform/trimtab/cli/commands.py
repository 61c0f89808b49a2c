"""Commands of the library: assets, registry, PEFT interchange and demo."""

from dataclasses import dataclass, field

from trimtab.cli.demo_config import DemoConfig
from trimtab.cli.main import Command
from trimtab.types import DEFAULT_BASE


@dataclass(frozen=True)
class AssetsConfig:
    """List models and data sets that can be fetched by name.

    Args:
        fetch: fetch all assets now, for use without a network.
    """

    fetch: bool = False


@dataclass(frozen=True)
class ListConfig:
    """List the prefixes and detectors in the registry.

    Args:
        base: list only the versions of this base model.
        live: URL of a server; lists the versions that it serves and those that it refuses.
        key: API key for that server, if it requires one.
    """

    base: str | None = None
    live: str | None = None
    key: str | None = None


@dataclass(frozen=True)
class VersionConfig:
    """Print the card of a version.

    Args:
        name: name of the prefix or detector.
        version: version number or alias.
        base: base model of the prefix or detector.
    """

    name: str
    version: str = "candidate"
    base: str = DEFAULT_BASE


@dataclass(frozen=True)
class RollbackConfig:
    """Make the previous champion the champion again.

    Args:
        name: name of the prefix or detector.
        base: base model of the prefix or detector.
    """

    name: str
    base: str = DEFAULT_BASE


@dataclass(frozen=True)
class LineageConfig:
    """Trace a response, a version or a run to its data, code and base model.

    Args:
        what: id of a response, a request or a run; or NAME, NAME@ALIAS or NAME@VERSION of a prefix or detector.
        base: base model of the prefix or detector.
        log_dir: folder of the server's logs, in which responses are looked up; if omitted, the logs folder in TRIMTAB_HOME.
        html: write the lineage as an HTML page to this file.
    """

    what: str
    base: str = DEFAULT_BASE
    log_dir: str | None = None
    html: str | None = None


@dataclass(frozen=True)
class UiConfig:
    """Open MLflow's web pages on the store that trimtab uses.

    Args:
        port: port to listen on, at the loopback address.
    """

    port: int = 5000


@dataclass(frozen=True)
class ImportConfig:
    """Convert a PEFT prompt-tuning adapter to a prefix.

    Args:
        adapter: folder of the adapter.
        name: name of the prefix.
        out: folder to write the prefix to.
        base: base model that the adapter was trained on.
    """

    adapter: str
    name: str = field(kw_only=True)
    out: str = field(kw_only=True)
    base: str = DEFAULT_BASE


@dataclass(frozen=True)
class ExportConfig:
    """Convert a prefix to a PEFT prompt-tuning adapter.

    Args:
        prefix: folder of the prefix, or NAME, NAME@ALIAS or NAME@VERSION in the registry.
        out: folder to write the adapter to.
        base: base model of the prefix.
    """

    prefix: str
    out: str = field(kw_only=True)
    base: str = DEFAULT_BASE


@dataclass(frozen=True)
class SyncConfig:
    """Send entries to MLflow that an outage delayed."""


ASSETS = Command(AssetsConfig, "trimtab.cli.assets_command:run_assets")
DEMO = Command(DemoConfig, "trimtab.cli.demo:run_demo")
EXPORT = Command(ExportConfig, "trimtab.peft_format:run_export")
IMPORT = Command(ImportConfig, "trimtab.peft_format:run_import")
LINEAGE = Command(LineageConfig, "trimtab.tracking.commands:run_lineage")
LIST = Command(ListConfig, "trimtab.tracking.commands:list_versions")
SHOW = Command(VersionConfig, "trimtab.tracking.commands:show_version")
ROLLBACK = Command(RollbackConfig, "trimtab.tracking.commands:rollback_champion")
SYNC = Command(SyncConfig, "trimtab.tracking.commands:sync_outboxes")
UI = Command(UiConfig, "trimtab.tracking.ui:run_ui")
