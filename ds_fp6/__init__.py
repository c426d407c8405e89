"""FP6-centric LLM serving: 6-bit floating-point weights in DeepSpeed-FastGen and MII.

Importing this package hooks DeepSpeed and MII, as installing it does (``autoload.py``), and imports nothing
heavy: each name below is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import Any

from ds_fp6 import autoload

__version__ = "0.1.0"

_EXPORTS = {
    "Format": "formats",
    "Mode": "formats",
    "PackedWeight": "weight",
    "linear": "weight",
    "quantize_reference": "quantize",
    "dequantize_reference": "quantize",
}
__all__ = [*_EXPORTS, "__version__"]

autoload.activate()


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
