"""Settings of the demo."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DemoConfig:
    """The whole story on this machine: learn, judge, register, serve, ask.

    Args:
        name: name of the prefix it learns.
        steps: optimiser steps.
        prompts: prompts of each side, harmful and benign, to learn from and to judge on.
        port: port to serve on; 0 takes a free one.
    """

    name: str = "demo"
    steps: int = 110
    prompts: int = 420
    port: int = 0
