"""GPU time by class of kernel, from torch's profiler."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

#: Classes in the order in which their patterns are tried on a kernel's name; what fits none is ``other``.
CLASSES = {
    "communication": r"nccl",
    "attention": r"attention|flash|fmha|_decode_kernel|_prefill_kernel|rotary|kv_",
    "linear": r"linear_sm\d+|gemm|gemv|nvjet|cutlass|splitkreduce|xmma|dequantize",
}
OTHER = "other"


class Kernel(NamedTuple):
    """One run of a kernel: its name, and when it began and ended, in seconds."""

    name: str
    begin: float
    end: float


def kernel_class(name: str) -> str:
    return next((kind for kind, pattern in CLASSES.items() if re.search(pattern, name, re.IGNORECASE)), OTHER)


def seconds_by_class(kernels: Iterable[Kernel]) -> dict[str, float]:
    """Summed durations; kernels that run at the same time count each."""
    totals = dict.fromkeys((*CLASSES, OTHER), 0.0)
    for kernel in kernels:
        totals[kernel_class(kernel.name)] += kernel.end - kernel.begin
    return totals


def busy_seconds(kernels: Iterable[Kernel]) -> float:
    """How long at least one kernel ran."""
    busy, until = 0.0, float("-inf")
    for kernel in sorted(kernels, key=lambda k: k.begin):
        busy += max(0.0, kernel.end - max(kernel.begin, until))
        until = max(until, kernel.end)
    return busy


def profile(work: Callable[[], object]) -> list[Kernel]:
    """The kernels, copies and fills that ``work`` runs on the GPU."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as recorded:
        work()
        torch.cuda.synchronize()
    on_gpu = (event for event in recorded.events() if event.device_type == torch.autograd.DeviceType.CUDA)
    return [Kernel(e.name, e.time_range.start / 1e6, e.time_range.end / 1e6) for e in on_gpu]
