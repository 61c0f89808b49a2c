"""trimtab: steering and monitoring of frozen language models with small trained parts.

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

# Imported lazily: importing trimtab imports neither torch nor vLLM.
_MODULES = {"Engine": "trimtab.engine.offline", "load_detector": "trimtab.loading", "load_prefix": "trimtab.loading"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'trimtab' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
