"""The allocator of KV cache blocks and sequence slots."""

from __future__ import annotations

from collections.abc import Iterable

import torch


class BlockAllocator:
    """Hands out the integers below ``num_blocks``, the most recently freed ones first.

    DeepSpeed's ``BlockedAllocator`` without pinned memory, which there is none of on a CPU.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"an allocator needs at least 1 block, got {num_blocks}")
        self._free = list(range(num_blocks - 1, -1, -1))
        self._used = bytearray(num_blocks)

    def allocate(self, num_blocks: int) -> torch.Tensor:
        """``num_blocks`` blocks, int32. Raises ``ValueError`` if fewer are free."""
        if num_blocks > len(self._free):
            raise ValueError(f"{num_blocks} blocks requested, {len(self._free)} are free")
        blocks = [self._free.pop() for _ in range(num_blocks)]
        for block in blocks:
            self._used[block] = 1
        return torch.tensor(blocks, dtype=torch.int32)

    def free(self, blocks: Iterable[int] | int) -> None:
        """Takes blocks back, all or, if one is unknown, free or named twice, none (``ValueError``)."""
        blocks = [int(block) for block in ([blocks] if isinstance(blocks, int) else blocks)]
        for block in blocks:
            if not 0 <= block < len(self._used) or not self._used[block]:
                raise ValueError(f"block {block} of {len(self._used)} is not in use")
        if len(set(blocks)) != len(blocks):
            raise ValueError(f"blocks to free are named twice: {blocks}")
        for block in blocks:
            self._used[block] = 0
        self._free.extend(reversed(blocks))

    @property
    def free_blocks(self) -> int:
        return len(self._free)
