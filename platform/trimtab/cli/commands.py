"""The commands of the library: assets, registry, interchange, demo."""

from dataclasses import dataclass, field

from trimtab.cli.demo_config import DemoConfig
from trimtab.cli.main import Command


@dataclass(frozen=True)
class AssetsConfig:
    """List what can be fetched by name.

    Args:
        fetch: fetch all of it now, for work without a network.
    """

    fetch: bool = False


@dataclass(frozen=True)
class ListConfig:
    """List prefixes and detectors in the registry.

    Args:
        base: only those of this base model.
        live: URL of a server, to see what it answers with, and what it refuses.
        key: API key, where that server asks for one.
    """

    base: str | None = None
    live: str | None = None
    key: str | None = None


@dataclass(frozen=True)
class VersionConfig:
    """One version of a prefix or a detector.

    Args:
        name: its name.
        version: its number, or an alias.
        base: its base model.
    """

    name: str
    version: str = "candidate"
    base: str = "smollm2-135m"


@dataclass(frozen=True)
class RollbackConfig:
    """Give champion back to the version before.

    Args:
        name: its name.
        base: its base model.
    """

    name: str
    base: str = "smollm2-135m"


@dataclass(frozen=True)
class LineageConfig:
    """Where something comes from: versions, runs, data, code, and who made it champion.

    Args:
        what: id of a response, a request or a run; or NAME, NAME@ALIAS or NAME@VERSION of a prefix or detector.
        base: base model of that name.
        logs: folder of the server's logs, where responses are looked up; without it, the one in trimtab's home.
        html: write the chain as a page to this file.
    """

    what: str
    base: str = "smollm2-135m"
    logs: str | None = None
    html: str | None = None


@dataclass(frozen=True)
class UiConfig:
    """Open MLflow on the store that trimtab uses.

    Args:
        port: port to listen on, on the loopback address.
    """

    port: int = 5000


@dataclass(frozen=True)
class ImportConfig:
    """Make a prefix of a PEFT prompt-tuning adapter.

    Args:
        adapter: the adapter's folder.
        name: name of the prefix.
        out: folder to write the prefix to.
        base: the base model that the adapter was trained on.
    """

    adapter: str
    name: str = field(kw_only=True)
    out: str = field(kw_only=True)
    base: str = "smollm2-135m"


@dataclass(frozen=True)
class ExportConfig:
    """Make a PEFT prompt-tuning adapter of a prefix.

    Args:
        prefix: a folder, or NAME, NAME@alias or NAME@version of the registry.
        out: folder to write the adapter to.
        base: the prefix's base model.
    """

    prefix: str
    out: str = field(kw_only=True)
    base: str = "smollm2-135m"


@dataclass(frozen=True)
class SyncConfig:
    """Send to MLflow what could not be sent during an outage."""


ASSETS = Command(
    "List what can be fetched by name, with licences and sizes.", AssetsConfig, "trimtab.cli.assets_command:run_assets"
)
DEMO = Command("The whole story on this machine in minutes.", DemoConfig, "trimtab.cli.demo:run_demo")
EXPORT = Command("Make a PEFT prompt-tuning adapter of a prefix.", ExportConfig, "trimtab.peft_format:run_export")
IMPORT = Command("Make a prefix of a PEFT prompt-tuning adapter.", ImportConfig, "trimtab.peft_format:run_import")
LINEAGE = Command("Where an answer, a version or a run comes from.", LineageConfig, "trimtab.tracking.commands:run_lineage")
LIST = Command("Prefixes and detectors in the registry.", ListConfig, "trimtab.tracking.commands:list_versions")
SHOW = Command("One version: its card and figures.", VersionConfig, "trimtab.tracking.commands:show_version")
ROLLBACK = Command("Give champion back to the version before.", RollbackConfig, "trimtab.tracking.commands:rollback_champion")
SYNC = Command("Send what an outage of MLflow kept from being logged.", SyncConfig, "trimtab.tracking.commands:sync_outboxes")
UI = Command("Open MLflow on the store that trimtab uses.", UiConfig, "trimtab.tracking.ui:run_ui")
