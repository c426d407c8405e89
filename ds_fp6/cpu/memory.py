"""How much memory the KV cache may take. On a CPU it shares the machine with everything else that runs there."""

from __future__ import annotations

import os
import re
from pathlib import Path

import psutil

#: A size such as ``512M`` or ``4G``, or a fraction of the available memory such as ``0.5``.
VARIABLE = "DS_FP6_KV_MEMORY"
DEFAULT_FRACTION = 0.25

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def _cgroup_headroom() -> int | None:
    """Bytes left in this process's memory control group, None where it has no limit."""
    for limit, usage in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            return max(0, int(Path(limit).read_text()) - int(Path(usage).read_text()))
        except (OSError, ValueError):
            continue
    return None


def available_bytes() -> int:
    """Memory that can be taken without swapping, within the limits of a container."""
    available = psutil.virtual_memory().available
    headroom = _cgroup_headroom()
    return available if headroom is None else min(available, headroom)


def kv_budget(available: int) -> int:
    """Bytes for the KV caches of this process, of ``available`` bytes on the machine.

    ``DS_FP6_KV_MEMORY`` gives it as a size or as a fraction of the available memory (default 0.25); the ranks of
    one machine share a fraction. Raises ``ValueError`` for another value of the variable.
    """
    text = os.environ.get(VARIABLE, "").strip() or str(DEFAULT_FRACTION)
    match = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)([KMGT]?)(i?B)?", text, re.IGNORECASE)
    if match is None:
        raise ValueError(f"{VARIABLE} must be a size such as 512M or 4G, or a fraction such as 0.5, got {text!r}")
    number, unit = float(match[1]), match[2].upper()
    if not unit and not match[3] and number <= 1:
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
        return int(available * number) // ranks
    return int(number * _UNITS[unit])
