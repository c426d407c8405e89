"""Host memory to a GPU, by several threads.

CUDA copies pageable memory, such as a mapped file, with the one thread that asks, and takes its page faults on the way: 6
to 9 GB/s on the hosts of H200s (``bench loading``). Here threads fill pinned buffers, and the device fetches one while
others are filled: eight threads load 18 GB/s.
"""

from __future__ import annotations

import contextlib
import os
import queue
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextvars import ContextVar

import numpy as np
import torch

BUFFER_BYTES = 8 << 20
MOST_THREADS = 8

#: Buffers that the device reads while each thread fills another.
BUFFERS_UNDER_WAY = 4

#: Of this thread: models may load side by side.
_in_force: ContextVar[Staging | None] = ContextVar("_in_force", default=None)


@contextlib.contextmanager
def staged(device: torch.device) -> Iterator[None]:
    """While this lasts, this thread's ``copy_`` and ``to`` go through pinned buffers where ``device`` is a GPU."""
    staging = Staging(device) if device.type == "cuda" else None
    before = _in_force.set(staging)
    try:
        yield
    finally:
        _in_force.reset(before)
        if staging is not None:
            staging.close()


def copy_(destination: torch.Tensor, source: torch.Tensor) -> None:
    """``destination.copy_(source)``, the same shape."""
    staging = _in_force.get()
    if staging is not None and staging.takes(destination, source):
        staging.copy(destination, source)
    else:
        destination.copy_(source)


def to(source: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``source.to(device)``."""
    if _in_force.get() is None or source.device.type != "cpu" or device.type == "cpu":
        return source.to(device)
    moved = torch.empty_like(source, device=device)
    copy_(moved, source)
    return moved


class Staging:
    """Threads and buffers that copy host memory to ``device``; both are made with the first tensor that takes them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._threads: ThreadPoolExecutor | None = None
        self._buffers: queue.SimpleQueue[_Buffer] = queue.SimpleQueue()

    def takes(self, destination: torch.Tensor, source: torch.Tensor) -> bool:
        """Whether the rows of ``source``, [n, ...] without gaps on the host, are worth it: more than one buffer."""
        return (
            destination.device.type == self._device.type
            and source.device.type == "cpu"
            and source.shape == destination.shape
            and source.is_contiguous()
            and source.nbytes > BUFFER_BYTES >= source.nbytes // len(source)
        )

    def copy(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        """Returns once ``source`` has been read; on the device the copy is in the current stream's order."""
        if self._threads is None:
            self._start()
        rows = BUFFER_BYTES // (source.nbytes // len(source))
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        parts = zip(destination.split(rows), source.detach().split(rows))
        copies: list[Future[None]] = [self._threads.submit(self._copy_part, *part, stream) for part in parts]
        wait(copies)
        for copy in copies:
            copy.result()

    def close(self) -> None:
        if self._threads is not None:
            self._threads.shutdown()

    def _start(self) -> None:
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
        threads = max(1, min(MOST_THREADS, len(os.sched_getaffinity(0)) // ranks))
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="ds_fp6-staging")
        for _ in range(threads + BUFFERS_UNDER_WAY):
            self._buffers.put(_Buffer(self._device))

    def _copy_part(self, destination: torch.Tensor, source: torch.Tensor, stream: torch.cuda.Stream | None) -> None:
        buffer = self._buffers.get()
        try:
            filled = buffer.fill(source)
            with torch.cuda.stream(stream):
                if not (destination.is_contiguous() and destination.dtype == source.dtype):
                    filled = filled.to(self._device, non_blocking=True)
                destination.copy_(filled, non_blocking=True)
                buffer.sent()
        finally:
            self._buffers.put(buffer)


class _Buffer:
    """Pinned host memory, and when the device has read it."""

    def __init__(self, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self._bytes = torch.empty(BUFFER_BYTES, dtype=torch.uint8, pin_memory=on_gpu)
        self._read = torch.cuda.Event() if on_gpu else None

    def fill(self, source: torch.Tensor) -> torch.Tensor:
        """A copy of ``source`` in this buffer, once what was here before has been read."""
        if self._read is not None:
            self._read.synchronize()
        used = self._bytes[: source.nbytes]
        # numpy copies with the calling thread only, and without the interpreter's lock.
        np.copyto(used.numpy(), source.reshape(-1).view(torch.uint8).numpy())
        return used.view(source.dtype).view(source.shape)

    def sent(self) -> None:
        """Notes that the current stream's work so far reads this buffer."""
        if self._read is not None:
            self._read.record()
