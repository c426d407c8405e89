"""What the attention kernels take."""

from __future__ import annotations

#: Channels of a head: a multiple of 16, the depth of a matrix product of tensor cores.
HEAD_STEP, MAX_HEAD = 16, 256

#: Query heads per key/value head that fit into a tile.
MAX_GROUP = 128


def problem(q_heads: int, kv_heads: int, head_size: int) -> str | None:
    """Why the kernels cannot run heads like these, None where they can."""
    if q_heads % kv_heads:
        return f"{q_heads} query heads are no multiple of {kv_heads} key/value heads"
    if q_heads // kv_heads > MAX_GROUP:
        return f"{q_heads // kv_heads} query heads per key/value head, more than {MAX_GROUP}"
    if head_size % HEAD_STEP or not 0 < head_size <= MAX_HEAD:
        return f"a head size of {head_size}, which is no multiple of {HEAD_STEP} up to {MAX_HEAD}"
    return None
