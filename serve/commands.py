"""Command-line entry points of the server."""

from trimtab.cli.main import Command
from trimtab.serve.api_keys import AddConfig, ListConfig, RemoveConfig
from trimtab.serve.config import ServeConfig
from trimtab.serve.traffic_command import TrafficConfig

SERVE = Command("Serve a base model and its prefixes over the OpenAI API.", ServeConfig, "trimtab.serve.server:run_serve")
KEYS_ADD = Command("Create an API key for `trimtab serve`.", AddConfig, "trimtab.serve.api_keys:run_keys_add")
KEYS_LIST = Command("List the API keys.", ListConfig, "trimtab.serve.api_keys:run_keys_list")
KEYS_REMOVE = Command("Remove an API key.", RemoveConfig, "trimtab.serve.api_keys:run_keys_remove")
TRAFFIC = Command(
    "Show requests, latency and mean risk of each version of a prefix.",
    TrafficConfig,
    "trimtab.serve.traffic_command:run_traffic",
)
