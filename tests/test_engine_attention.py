"""Triton's attention kernels against fp64, on the GPU where there is one and in Triton's interpreter where not."""

from __future__ import annotations

import attention_cases as cases
import pytest
import torch
from triton_device import DEVICE, DTYPES

from ds_fp6.triton_ops import plan
from ds_fp6.triton_ops.decode import DecodeWorkspace, decode_attention
from ds_fp6.triton_ops.prefill import prefill_attention

SHAPES = {  # q heads, kv heads, head size, block size
    "mha-64": (2, 2, 64, 128),
    "gqa4-128": (4, 1, 128, 64),
    "gqa8-80": (8, 1, 80, 64),
    "gqa5-96": (5, 1, 96, 64),
}


def decode(batch: cases.Batch, scale: float, window: int | None, splits: int | None) -> torch.Tensor:
    _, _, _, kv_heads, head_size = batch.cache.shape
    out = torch.full_like(batch.q, float("nan"), memory_format=torch.contiguous_format)
    group = batch.q_heads // kv_heads
    n = len(batch.lengths)
    partials = n * kv_heads * (splits or plan.splits(n, kv_heads))
    workspace = DecodeWorkspace(n, kv_heads, group, head_size, DEVICE, partials)
    decode_attention(out, batch.q, batch.cache, batch.sequences, batch.pointers, scale, window, workspace, splits)
    # A launch leaves the counters as it found them, for the next.
    assert not workspace.counters.any()
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("lengths", cases.DECODE)
def test_decode(lengths, shape, dtype):
    batch = cases.make(cases.DECODE[lengths], *SHAPES[shape], dtype, DEVICE)
    scale = SHAPES[shape][2] ** -0.5
    for splits in (1, 7):
        found = decode(batch, scale, None, splits)
        assert cases.error(found, cases.attention(batch, scale)) < cases.TOLERANCE[dtype]


@pytest.mark.parametrize("shape", ["gqa8-80", "mha-64"])
def test_decode_over_more_programs_than_are_added_up_at_a_time(shape):
    batch = cases.make([(1, 1200), (1, 70)], *SHAPES[shape], torch.float16, DEVICE)
    scale = SHAPES[shape][2] ** -0.5
    found = decode(batch, scale, None, 32)
    assert cases.error(found, cases.attention(batch, scale)) < cases.TOLERANCE[torch.float16]


@pytest.mark.parametrize("window", [1, 63, 64, 200])
def test_decode_in_a_window(window):
    batch = cases.make(cases.DECODE["mixed lengths"], 4, 1, 64, 128, torch.float16, DEVICE)
    found = decode(batch, 0.125, window, 4)
    assert cases.error(found, cases.attention(batch, 0.125, window)) < cases.TOLERANCE[torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("lengths", cases.PREFILL)
def test_prefill(lengths, shape, dtype):
    batch = cases.make(cases.PREFILL[lengths], *SHAPES[shape], dtype, DEVICE)
    scale = SHAPES[shape][2] ** -0.5
    out = torch.full_like(batch.q, float("nan"), memory_format=torch.contiguous_format)
    prefill_attention(out, batch.q, batch.cache, batch.sequences, batch.pointers, scale, None)
    assert cases.error(out, cases.attention(batch, scale)) < cases.TOLERANCE[dtype]


@pytest.mark.parametrize("window", [1, 30, 64, 100])
def test_prefill_in_a_window(window):
    batch = cases.make(cases.PREFILL["later parts"], 8, 2, 64, 128, torch.float16, DEVICE)
    out = torch.empty_like(batch.q, memory_format=torch.contiguous_format)
    prefill_attention(out, batch.q, batch.cache, batch.sequences, batch.pointers, 0.125, window)
    assert cases.error(out, cases.attention(batch, 0.125, window)) < cases.TOLERANCE[torch.float16]


def test_a_mixed_batch_is_shared_between_the_kernels():
    batch = cases.make(cases.PREFILL["mixed"], 8, 2, 64, 128, torch.float16, DEVICE)
    expected = cases.attention(batch, 0.125)
    single = torch.repeat_interleave(
        torch.tensor([n == 1 for n, _ in batch.lengths]), torch.tensor([n for n, _ in batch.lengths])
    )
    out = decode(batch, 0.125, None, 2)
    assert out[single].isfinite().all() and out[~single].isnan().all()
    prefill_attention(out, batch.q, batch.cache, batch.sequences, batch.pointers, 0.125, None, singles=False)
    assert cases.error(out, expected) < cases.TOLERANCE[torch.float16]


def test_a_workspace_that_is_too_small_is_refused():
    batch = cases.make(cases.DECODE["mixed lengths"], 4, 1, 64, 128, torch.float16, DEVICE)
    out = torch.empty_like(batch.q, memory_format=torch.contiguous_format)
    small = DecodeWorkspace(2, 1, 4, 64, DEVICE)
    with pytest.raises(ValueError, match="no room for 4 sequences"):
        decode_attention(out, batch.q, batch.cache, batch.sequences, batch.pointers, 0.125, None, small)
