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
LENGTHS = [(1, 63), (5, 62), (2, 64), (70, 0), (1, 0)]


@pytest.mark.parametrize("part", [1.0, 0.5, 0.0], ids=["whole", "half", "none"])
@pytest.mark.parametrize("shape", SHAPES)
def test_rotary_and_cache_writes(shape, part):
    q_heads, _, size, _ = SHAPES[shape]
    batch = cases.make(LENGTHS, *SHAPES[shape], torch.float16, DEVICE, written=False)
    n = len(batch.tokens)
    frequencies = cases.frequencies(int(size * part) // 2, DEVICE)
    expected = cases.after(batch, frequencies, singles=False)

    # Two rows beyond the batch, as captured launches have them.
    padded = torch.cat([batch.qkv, torch.full_like(batch.qkv[:2], 7)])
    rotate_and_store(
        padded, batch.cache, frequencies, batch.metadata, batch.sequences, batch.tokens, batch.pointers
    )
    # Sequences of one token are left to the decode kernel.
    single = torch.tensor([LENGTHS[i][0] == 1 for i in batch.tokens.tolist()], device=DEVICE)
    assert torch.equal(padded[:n][single], batch.qkv[single])
    found, wanted = padded[:n, : q_heads * size][~single], expected.q[~single]
    torch.testing.assert_close(found, wanted, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(batch.cache, expected.cache, rtol=2e-3, atol=2e-3, equal_nan=True)
    assert torch.equal(padded[:n, q_heads * size :], batch.qkv[:, q_heads * size :])
    assert (padded[n:] == 7).all()
