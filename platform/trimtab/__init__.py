"""trimtab: steer and check frozen language models with tiny learned parts.

import trimtab

engine = trimtab.Engine("smollm2-135m")
print(engine.chat([{"role": "user", "content": "Hello"}], prefix=trimtab.load_prefix("mine")).text)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trimtab.engine.offline import Engine
    from trimtab.loading import load_detector, load_prefix

__all__ = ["Engine", "load_detector", "load_prefix"]

# Looked up when they are asked for: importing trimtab imports neither torch nor vLLM.
_PLACES = {"Engine": "trimtab.engine.offline", "load_detector": "trimtab.loading", "load_prefix": "trimtab.loading"}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'trimtab' has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)
