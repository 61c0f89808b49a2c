"""Settings of the demo."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DemoConfig:
    """Train, serve and query a prefix, a guard and a detector on this machine in minutes.

    Args:
        name: name of the prefix, which begins the names of the detectors.
        steps: optimizer steps.
        prompts: number of harmful and number of benign prompts for training and evaluation.
        port: port of the server; 0 selects a free port.
        guard_prompts: number of prompts to train the guard on; 0 for all of the project's prompts.
    """

    name: str = "demo"
    steps: int = 110
    prompts: int = 420
    port: int = 0
    guard_prompts: int = 1500
