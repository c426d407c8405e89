"""Triton's rotary embedding and cache writes against plain torch in fp32."""

from __future__ import annotations

import attention_cases as cases
import pytest
import torch
from triton_device import DEVICE

from ds_fp6.triton_ops.rotary import rotate_and_store

SHAPES = {  # q heads, kv heads, head size, block size
    "gqa-128": (8, 2, 128, 64), "mha-80": (3, 3, 80, 64), "mqa-64": (5, 1, 64, 128), "mha-96": (2, 2, 96, 64),
}  # fmt: skip
LENGTHS = [(1, 63), (5, 62), (1, 64), (70, 0), (1, 0)]


def rotated(x: torch.Tensor, positions: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
    """[n, heads, size] rotated by halves, in fp32, rounded once."""
    half = len(frequencies)
    angles = positions.float().unsqueeze(1) * frequencies
    cos, sin = angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)
    a, b, kept = x.float().split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, kept], dim=-1).to(x.dtype)


@pytest.mark.parametrize("part", [1.0, 0.5, 0.0], ids=["whole", "half", "none"])
@pytest.mark.parametrize("shape", SHAPES)
def test_rotary_and_cache_writes(shape, part):
    q_heads, kv_heads, size, block_size = SHAPES[shape]
    batch = cases.make(LENGTHS, *SHAPES[shape], torch.float16, DEVICE, written=False)
    n = len(batch.tokens)
    pairs = int(size * part) // 2
    frequencies = (1e4 ** -(torch.arange(pairs) / max(pairs, 1))).float().to(DEVICE) if part else None
    positions = torch.cat([torch.arange(seen, seen + count) for count, seen in LENGTHS]).to(DEVICE)
    q, k, v = (t.reshape(n, -1, size) for t in batch.qkv.split([q_heads * size, kv_heads * size, kv_heads * size], 1))
    if part:
        q, k = rotated(q, positions, frequencies), rotated(k, positions, frequencies)
    slots = batch.block_lists[batch.tokens.long(), positions // block_size].long(), positions % block_size
    expected = batch.cache.clone()
    expected[slots[0], slots[1], 0], expected[slots[0], slots[1], 1] = k, v

    # Two rows beyond the batch, as captured launches have them.
    padded = torch.cat([batch.qkv, torch.full_like(batch.qkv[:2], 7)])
    rotate_and_store(
        padded, batch.cache, frequencies, batch.metadata, batch.sequences, batch.tokens, batch.pointers
    )
    torch.testing.assert_close(padded[:n, : q_heads * size].reshape(n, -1, size), q, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(batch.cache, expected, rtol=2e-3, atol=2e-3, equal_nan=True)
    assert (padded[n:] == 7).all()
