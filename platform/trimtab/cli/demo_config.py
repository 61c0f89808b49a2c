"""Settings of the demo."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DemoConfig:
    """Train, serve and query a prefix and a detector on this machine in minutes.

    Args:
        name: name of the prefix.
        steps: optimizer steps.
        prompts: number of harmful and number of benign prompts for training and evaluation.
        port: port of the server; 0 selects a free port.
    """

    name: str = "demo"
    steps: int = 110
    prompts: int = 420
    port: int = 0
