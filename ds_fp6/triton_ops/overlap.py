"""Programmatic dependent launch: a kernel's start overlaps the end of the one before it.

A kernel says at once that its successor may start, and waits for its predecessor before it reads what that one wrote.
What lies on the device from before the step (the batch's tensors, lists of cache blocks) may be read ahead of that.
"""

from __future__ import annotations

import functools
import os

import torch
import triton

#: ``1`` or ``0``; unset is 1.
VARIABLE = "DS_FP6_DEPENDENT_LAUNCH"


def wanted() -> bool:
    """Whether the environment leaves it on. Raises ``ValueError`` for another value of the variable."""
    text = os.environ.get(VARIABLE, "").strip()
    if text not in ("", "0", "1"):
        raise ValueError(f"{VARIABLE} must be 0 or 1, got {text!r}")
    return text != "0"


@functools.cache
def supported(device: torch.device) -> bool:
    """Whether kernels on ``device`` are launched this way: on Hopper and newer, as the environment is when first asked.

    Raises ``ValueError`` for another value of the variable than 0 or 1.
    """
    return (
        wanted()
        and device.type == "cuda"
        and not triton.knobs.runtime.interpret
        and torch.cuda.get_device_capability(device) >= (9, 0)
    )
