"""Triton kernels of the attention layer (rotary embedding and cache writes, decode and prefill attention), of norms and
gated activations, and of the choice of the likeliest tokens.

Those of the attention layer work on FastGen's ragged batch as it lies on the device:
    metadata   int32 [2]          tokens and sequences in the batch
    sequences  int32 [n_seqs, 4]  first token, tokens, tokens seen before, unused
    tokens     int32 [n_tokens]   the sequence of each token
    pointers   int64 [n_seqs]     address of each sequence's int32 list of cache blocks
and on one layer of its blocked cache, [blocks, block_size, 2, kv_heads, head_size], keys before values. Nothing is
read back to the host: grids follow from what the host knows when it launches, lengths are read on the device.

Importing this package needs no Triton; its modules do.
"""

from __future__ import annotations

import importlib.util


def problem() -> str | None:
    """Why Triton's kernels cannot be used in this environment, None where they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (torch's CUDA builds for Linux bring it)"
    try:
        import triton.language  # noqa: F401
    except Exception as error:
        return f"triton cannot be imported: {error}"
    return None
