"""Builders of the compiled extensions, on DeepSpeed's ``OpBuilder``. Installed as ``ds_fp6.op_builder``.

The builders are imported when they are asked for: DeepSpeed's accelerators look for a name in whatever top-level
``op_builder`` they find, which in a checkout is this package, and that must cost them nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

_BUILDERS = {"CPUBuilder": "cpu", "CUDABuilder": "cuda"}
__all__ = ["CPUBuilder", "CUDABuilder"]


def __getattr__(name: str) -> Any:
    if name in _BUILDERS:
        return getattr(importlib.import_module(f"{__name__}.{_BUILDERS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
