"""Where loaded parameters stay.

Each parameter is moved here the moment it is complete, so whatever it was made from can be let go. There is no
buffer of the whole model: DeepSpeed's would have to exist beside the parameters that are copied into it.
"""

from __future__ import annotations

import contextlib
import mmap

import torch

ALIGNMENT = 256
CHUNK_BYTES = 1 << 30


class HostArena:
    """Tensors side by side in large anonymous mappings, on huge pages where the system grants them.

    A matrix-vector product reads every weight once; with 4 KiB pages it would miss the TLB once per page. A mapping
    costs only the pages that are written, so the unused end of the last one is free.
    """

    def __init__(self) -> None:
        self._chunk = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        size = tensor.numel() * tensor.element_size()
        if self._used + size > self._chunk.numel():
            self._chunk, self._used = _map_anonymous(max(size, CHUNK_BYTES)), 0
        copy = view_at(self._chunk, self._used, tensor.dtype, tensor.shape, dense_strides(tensor))
        copy.copy_(tensor)
        self._used += aligned(size)
        return copy


class DeviceMemory:
    """Tensors in allocations of their own on an accelerator, whose allocator keeps freed blocks for the next layer."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        moved = tensor.to(self._device)
        # A view would hold all of the tensor that it is cut from.
        return moved.clone() if moved.untyped_storage().nbytes() > moved.numel() * moved.element_size() else moved


def parameter_memory(device: torch.device) -> HostArena | DeviceMemory:
    return HostArena() if device.type == "cpu" else DeviceMemory(device)


def aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def dense_strides(tensor: torch.Tensor) -> tuple[int, ...]:
    """Strides of a copy without gaps that keeps the order of the dimensions."""
    return torch.empty_like(tensor, device="meta", memory_format=torch.preserve_format).stride()


def view_at(
    buffer: torch.Tensor, offset: int, dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[int, ...]
) -> torch.Tensor:
    """A tensor of the bytes of ``buffer`` (uint8 [n]) from ``offset`` on."""
    numel = torch.Size(shape).numel()
    return buffer[offset : offset + numel * dtype.itemsize].view(dtype).as_strided(shape, strides)


def _map_anonymous(size: int) -> torch.Tensor:
    memory = mmap.mmap(-1, aligned(size), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # kernels built without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
