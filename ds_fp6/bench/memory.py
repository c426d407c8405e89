"""The most memory that this process has held."""

from __future__ import annotations

import torch


class PeakMemory:
    """Since construction, on the GPU as torch's allocator counts it; else resident on the host, since the start."""

    def __init__(self) -> None:
        self.kind = "on the GPU" if torch.cuda.is_available() else "resident"
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        """Bytes."""
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated()
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
