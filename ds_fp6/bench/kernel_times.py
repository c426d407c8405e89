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


def taken(kernels: Iterable[Kernel]) -> list[tuple[Kernel, float]]:
    """Each kernel, in the order of their ends, and the seconds in which of all that ran it was the next to end.

    Kernels overlap where one starts before the one ahead of it has ended; these seconds add up to those in which at
    least one ran.
    """
    found: list[tuple[Kernel, float]] = []
    counted: list[tuple[float, float]] = []  # stretches of time, apart and in order
    for kernel in sorted(kernels, key=lambda kernel: kernel.end):
        begin, seconds = kernel.begin, kernel.end - kernel.begin
        while counted and counted[-1][1] > kernel.begin:
            earlier = counted.pop()
            seconds -= earlier[1] - max(earlier[0], kernel.begin)
            begin = min(begin, earlier[0])
        counted.append((begin, kernel.end))
        found.append((kernel, seconds))
    return found


def seconds_by_class(kernels: Iterable[Kernel]) -> dict[str, float]:
    """The seconds that were ``taken`` by each class."""
    totals = dict.fromkeys((*CLASSES, OTHER), 0.0)
    for kernel, seconds in taken(kernels):
        totals[kernel_class(kernel.name)] += seconds
    return totals


def by_name(kernels: Iterable[Kernel]) -> list[tuple[str, int, float]]:
    """(name, runs, seconds that they have taken) of all kernels of a name, those that took most first."""
    runs: dict[str, list[float]] = {}
    for kernel, seconds in taken(kernels):
        runs.setdefault(kernel.name, []).append(seconds)
    return sorted(((name, len(each), sum(each)) for name, each in runs.items()), key=lambda row: -row[2])


def gaps(kernels: Iterable[Kernel]) -> list[tuple[str, str, int, float]]:
    """(name before, name after, times, seconds) of all stretches in which nothing ran, those that took most first."""
    found: dict[tuple[str, str], list[float]] = {}
    last: Kernel | None = None  # of those so far, the one that ended last
    for kernel in sorted(kernels, key=lambda kernel: kernel.begin):
        if last is not None and kernel.begin > last.end:
            found.setdefault((last.name, kernel.name), []).append(kernel.begin - last.end)
        if last is None or kernel.end > last.end:
            last = kernel
    return sorted(((*names, len(each), sum(each)) for names, each in found.items()), key=lambda row: -row[3])


def profile(work: Callable[[], object]) -> list[Kernel]:
    """The kernels, copies and fills that ``work`` runs on the GPU."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as recorded:
        work()
        torch.cuda.synchronize()
    on_gpu = (event for event in recorded.events() if event.device_type == torch.autograd.DeviceType.CUDA)
    return [Kernel(e.name, e.time_range.start / 1e6, e.time_range.end / 1e6) for e in on_gpu]
