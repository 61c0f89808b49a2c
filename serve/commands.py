"""Command-line entry points of the server."""

from trimtab.cli.main import Command
from trimtab.serve.api_keys import AddConfig, ListConfig, RemoveConfig
from trimtab.serve.config import ServeConfig
from trimtab.serve.live.label_config import (
    FeedbackAskConfig,
    FeedbackImportConfig,
    FeedbackListConfig,
    FeedbackPromptsConfig,
)
from trimtab.serve.traffic_command import TrafficConfig

FEEDBACK_ASK = Command(FeedbackAskConfig, "trimtab.serve.live.ask_command:run_feedback_ask")
FEEDBACK_IMPORT = Command(FeedbackImportConfig, "trimtab.serve.live.label_commands:run_feedback_import")
FEEDBACK_LIST = Command(FeedbackListConfig, "trimtab.serve.live.label_commands:run_feedback_list")
FEEDBACK_PROMPTS = Command(FeedbackPromptsConfig, "trimtab.serve.live.prompt_command:run_feedback_prompts")
SERVE = Command(ServeConfig, "trimtab.serve.server:run_serve")
KEYS_ADD = Command(AddConfig, "trimtab.serve.api_keys:run_keys_add")
KEYS_LIST = Command(ListConfig, "trimtab.serve.api_keys:run_keys_list")
KEYS_REMOVE = Command(RemoveConfig, "trimtab.serve.api_keys:run_keys_remove")
TRAFFIC = Command(TrafficConfig, "trimtab.serve.traffic_command:run_traffic")
