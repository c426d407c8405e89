"""Programmatic dependent launch: a kernel's start overlaps the end of the one before it.

A kernel says at once that its successor may start, and waits for its predecessor before it reads what that one wrote.
What lies on the device from before the step (the batch's tensors, lists of cache blocks) may be read ahead of that.
"""

from __future__ import annotations

import functools

import torch
import triton


@functools.cache
def supported(device: torch.device) -> bool:
    """Whether kernels on ``device`` can be launched this way: on Hopper and newer."""
    return (
        device.type == "cuda"
        and not triton.knobs.runtime.interpret
        and torch.cuda.get_device_capability(device) >= (9, 0)
    )
