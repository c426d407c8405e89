"""Triton's attention kernels against fp64, on the GPU where there is one and in Triton's interpreter where not."""

from __future__ import annotations

import dataclasses

import attention_cases as cases
import pytest
import torch
from triton_device import DEVICE, DTYPES

from ds_fp6.triton_ops import plan
from ds_fp6.triton_ops.decode import DecodeWorkspace, decode_attention
from ds_fp6.triton_ops.prefill import prefill_attention
from ds_fp6.triton_ops.rotary import rotate_and_store

SHAPES = {  # q heads, kv heads, head size, block size
    "mha-64": (2, 2, 64, 128),
    "gqa4-128": (4, 1, 128, 64),
    "gqa8-80": (8, 1, 80, 64),
    "gqa5-96": (5, 1, 96, 64),
}


def decode(
    batch: cases.Batch, scale: float, window: int | None, splits: int | None, frequencies: torch.Tensor | None = None,
    program_keys: int = 64,
) -> torch.Tensor:  # fmt: skip
    kv_heads, head_size = batch.cache.shape[-2:]
    out = torch.full_like(batch.q, float("nan"), memory_format=torch.contiguous_format)
    group = batch.q_heads // kv_heads
    n = len(batch.lengths)
    partials = n * kv_heads * (splits or plan.splits(n, kv_heads))
    workspace = DecodeWorkspace(n, kv_heads, group, head_size, DEVICE, partials)
    decode_attention(
        out, batch.qkv, batch.cache, frequencies, batch.sequences, batch.pointers, scale, window, workspace, splits,
        program_keys=program_keys,
    )  # fmt: skip
    # A launch leaves the counters as it found them, for the next.
    assert not workspace.counters.any()
    return out


def check_decode(batch: cases.Batch, window: int | None, splits: int | None, pairs: int) -> None:
    """The kernel's result and what it leaves in the cache, for sequences of one token."""
    scale, dtype = batch.cache.shape[-1] ** -0.5, batch.qkv.dtype
    frequencies, before = cases.frequencies(pairs, DEVICE), batch.qkv.clone()
    expected = cases.after(batch, frequencies, singles=True)
    found = decode(batch, scale, window, splits, frequencies)
    assert cases.error(found, cases.attention(expected, scale, window)) < cases.TOLERANCE[dtype]
    tolerance = cases.TOLERANCE[dtype]
    torch.testing.assert_close(batch.cache, expected.cache, rtol=tolerance, atol=tolerance, equal_nan=True)
    assert torch.equal(batch.qkv, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("lengths", cases.DECODE)
def test_decode(lengths, shape, dtype):
    for splits, part in ((1, 1.0), (7, 0.5)):
        batch = cases.make(cases.DECODE[lengths], *SHAPES[shape], dtype, DEVICE, written=False)
        check_decode(batch, None, splits, int(SHAPES[shape][2] * part) // 2)


@pytest.mark.parametrize("shape", ["gqa8-80", "mha-64"])
def test_decode_over_more_programs_than_are_added_up_at_a_time(shape):
    batch = cases.make([(1, 1200), (1, 70)], *SHAPES[shape], torch.float16, DEVICE, written=False)
    check_decode(batch, None, 32, 0)


@pytest.mark.parametrize("window", [1, 63, 64, 200])
def test_decode_in_a_window(window):
    batch = cases.make(cases.DECODE["mixed lengths"], 4, 1, 64, 128, torch.float16, DEVICE, written=False)
    check_decode(batch, window, 4, 32)


@pytest.mark.parametrize("shape, pairs", [((4, 1, 64, 128), 5), ((2, 1, 256, 64), 128), ((20, 1, 32, 128), 8)])
def test_decode_of_other_heads(shape, pairs):
    batch = cases.make([(1, 64), (1, 130)], *shape, torch.float16, DEVICE, written=False)
    check_decode(batch, None, 2, pairs)


def test_first_tokens_attend_to_their_own_values():
    # Two of them share a place in the cache, as the sequences do that fill a batch up.
    batch = cases.make([(1, 0)] * 3, 8, 2, 64, 128, torch.float16, DEVICE, written=False)
    batch.pointers[2] = batch.pointers[1]
    values = cases.split(batch)[2].repeat_interleave(4, dim=1).reshape(3, -1)
    assert torch.equal(decode(batch, 0.125, None, None, cases.frequencies(32, DEVICE)), values)


@pytest.mark.parametrize("size, pairs", [(128, 64), (80, 16), (96, 48)])
def test_both_kernels_rotate_alike(size, pairs):
    """To the bit: the key that either leaves in the cache, and the result for queries that are rotated already."""
    frequencies = cases.frequencies(pairs, DEVICE)
    batch = cases.make([(1, 65), (1, 700)], 4, 2, size, 64, torch.float16, DEVICE, written=False)
    # The same tokens as the second ones of sequences of two.
    rows = torch.stack([batch.qkv, batch.qkv], 1).flatten(0, 1).contiguous()
    sequences, tokens = batch.sequences.clone(), torch.tensor([0, 0, 1, 1], dtype=torch.int32, device=DEVICE)
    sequences[:, 0], sequences[:, 1] = torch.tensor([0, 2]), 2
    sequences[:, 2] -= 1
    other = dataclasses.replace(batch, cache=batch.cache.clone())
    rotate_and_store(rows, other.cache, frequencies, 2 * batch.metadata, sequences, tokens, batch.pointers)
    found = decode(batch, 0.1, None, 2, frequencies)
    for i, at in enumerate((65, 700)):
        place = int(batch.block_lists[i, at // 64]), at % 64
        assert torch.equal(batch.cache[place], other.cache[place])
        rows[2 * i + 1, 4 * size :] = other.cache[place].flatten()
    other = dataclasses.replace(batch, qkv=rows[1::2].contiguous())
    assert torch.equal(decode(other, 0.1, None, 2, None), found)


def test_a_batch_is_added_up_like_the_one_it_is_filled_up_to():
    found = []
    for count in (3, 4):
        batch = cases.make([(1, 600)] * 4, 4, 1, 64, 128, torch.float16, DEVICE, written=False)
        kept = {name: getattr(batch, name)[:count] for name in ("qkv", "sequences", "pointers", "tokens")}
        batch = dataclasses.replace(batch, lengths=batch.lengths[:count], **kept)
        found.append(decode(batch, 0.125, None, None, cases.frequencies(32, DEVICE)))
    assert plan.splits(3, 1) > 1 and torch.equal(found[0], found[1][:3])


def prefill(batch: cases.Batch, scale: float, window: int | None = None, long: bool = False) -> torch.Tensor:
    out = torch.full_like(batch.q, float("nan"), memory_format=torch.contiguous_format)
    prefill_attention(
        out, batch.q, batch.cache, batch.sequences, batch.pointers, scale, window, long=long
    )  # fmt: skip
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("lengths", cases.PREFILL)
def test_prefill(lengths, shape, dtype):
    batch = cases.make(cases.PREFILL[lengths], *SHAPES[shape], dtype, DEVICE)
    scale = SHAPES[shape][2] ** -0.5
    expected = cases.attention(batch, scale)
    several = torch.tensor([batch.lengths[i][0] > 1 for i in batch.tokens.tolist()], device=DEVICE)
    found = prefill(batch, scale, long=lengths == "later parts")
    assert cases.error(found[several], expected[several]) < cases.TOLERANCE[dtype]
    # Sequences of one query are the decode kernel's.
    assert found[~several].isnan().all()


@pytest.mark.parametrize("window", [1, 30, 64, 100])
def test_prefill_in_a_window(window):
    batch = cases.make(cases.PREFILL["later parts"], 8, 2, 64, 128, torch.float16, DEVICE)
    found = prefill(batch, 0.125, window)
    assert cases.error(found, cases.attention(batch, 0.125, window)) < cases.TOLERANCE[torch.float16]


def test_a_mixed_batch_is_shared_between_the_kernels():
    batch = cases.make(cases.PREFILL["mixed"], 8, 2, 64, 128, torch.float16, DEVICE, written=False)
    frequencies = cases.frequencies(32, DEVICE)
    expected = cases.after(batch, frequencies, singles=True)
    others = cases.after(batch, frequencies, singles=False)
    expected = dataclasses.replace(expected, cache=torch.where(others.cache.isnan(), expected.cache, others.cache))
    out = decode(batch, 0.125, None, 2, frequencies)
    rotate_and_store(
        batch.qkv, batch.cache, frequencies, batch.metadata, batch.sequences, batch.tokens, batch.pointers
    )
    several = torch.tensor([batch.lengths[i][0] > 1 for i in batch.tokens.tolist()], device=DEVICE)
    assert out[~several].isfinite().all() and out[several].isnan().all()
    prefill_attention(out, batch.q, batch.cache, batch.sequences, batch.pointers, 0.125, None)
    assert cases.error(out, cases.attention(expected, 0.125)) < cases.TOLERANCE[torch.float16]
    torch.testing.assert_close(batch.cache, expected.cache, rtol=2e-3, atol=2e-3, equal_nan=True)


@pytest.mark.parametrize("head_size", [64, 80, 128, 256])
def test_tiles(head_size):
    for group, page in ((1, 64), (8, 64), (71, 128)):
        for tile in (plan.decode_tile(head_size, group, page), plan.prefill_tile(head_size, group, page),
                     plan.prefill_tile(head_size, group, page, long=True)):  # fmt: skip
            assert tile.rows >= max(group, plan.MIN_ROWS) and page % tile.keys == 0


def test_a_workspace_that_is_too_small_is_refused():
    batch = cases.make(cases.DECODE["mixed lengths"], 4, 1, 64, 128, torch.float16, DEVICE)
    out = torch.empty_like(batch.q, memory_format=torch.contiguous_format)
    small = DecodeWorkspace(2, 1, 4, 64, DEVICE)
    with pytest.raises(ValueError, match="no room for 4 sequences"):
        decode_attention(
            out, batch.qkv, batch.cache, None, batch.sequences, batch.pointers, 0.125, None, small
        )  # fmt: skip
