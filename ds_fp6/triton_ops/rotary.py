"""Rotary embedding of queries and keys, and the writing of keys and values into the blocked cache, in one launch.

It is for sequences of more than one new token: those of one are ``decode``'s, which does the same by itself.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ds_fp6.triton_ops import overlap, plan

#: Heads of a token that a program takes.
HEADS = 8


@triton.jit
def rotated(x, other, cosine, sine):
    """``x`` turned with ``other``, the second channel of its pair: both in 16 bits, the angle's parts in fp32.

    ``sine`` is negative for the first channel of a pair. The products are fused here and not by the compiler, so that
    all kernels round alike.
    """
    return tl.fma(x.to(tl.float32), cosine, other.to(tl.float32) * sine).to(x.dtype)


@triton.jit
def _rotary_kernel(
    qkv,  # [n_tokens, (Q_HEADS + 2 · KV_HEADS) · HEAD]: queries, rotated in place, then keys, then values
    cache,  # one layer's
    frequencies,  # fp32 [HALF]: a pair's angle at position 1
    metadata, sequences, tokens, pointers,  # the ragged batch's
    qkv_stride, block_stride, token_stride,
    Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD: tl.constexpr, PAGE: tl.constexpr,
    HALF: tl.constexpr,  # pairs of a head that are rotated: channel c with channel c + HALF; 0 is no rotation
    HEADS: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        gdc_launch_dependents()
    token = tl.program_id(0)
    if token >= tl.load(metadata):
        return
    sequence = tl.load(tokens + token)
    if tl.load(sequences + sequence * 4 + 1) == 1:
        return
    position = tl.load(sequences + sequence * 4 + 2) + token - tl.load(sequences + sequence * 4)
    blocks = tl.load(pointers + sequence).to(tl.pointer_type(tl.int32))
    block = tl.load(blocks + position // PAGE).to(tl.int64)

    # Queries stay in their row. A token's keys and values lie in the cache as they lie in the row, one after another.
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    if HALF == 0:
        head += Q_HEADS
    live, is_query = head < Q_HEADS + 2 * KV_HEADS, head < Q_HEADS
    from_row = qkv + token.to(tl.int64) * qkv_stride + head[:, None] * HEAD
    to_cache = cache + block * block_stride + (position % PAGE) * token_stride + (head - Q_HEADS)[:, None] * HEAD
    stored = (live & ~is_query)[:, None]

    if OVERLAP:
        gdc_wait()
    if HALF > 0:
        pair = tl.arange(0, PAIRS)
        inside = (pair < HALF)[None, :]
        angle = position.to(tl.float32) * tl.load(frequencies + pair, mask=pair < HALF, other=0.0)
        cosine, sine = tl.cos(angle)[None, :], tl.sin(angle)[None, :]
        first = tl.load(from_row + pair[None, :], mask=live[:, None] & inside, other=0.0)
        second = tl.load(from_row + HALF + pair[None, :], mask=live[:, None] & inside, other=0.0)
        turns = (head < Q_HEADS + KV_HEADS)[:, None]
        new_first, new_second = rotated(first, second, cosine, -sine), rotated(second, first, cosine, sine)
        first, second = tl.where(turns, new_first, first), tl.where(turns, new_second, second)
        tl.store(from_row + pair[None, :], first, mask=is_query[:, None] & inside)
        tl.store(from_row + HALF + pair[None, :], second, mask=is_query[:, None] & inside)
        tl.store(to_cache + pair[None, :], first, mask=stored & inside)
        tl.store(to_cache + HALF + pair[None, :], second, mask=stored & inside)
    if 2 * HALF < HEAD:
        channel = 2 * HALF + tl.arange(0, REST)
        inside = stored & (channel < HEAD)[None, :]
        tl.store(to_cache + channel[None, :], tl.load(from_row + channel[None, :], mask=inside), mask=inside)


def rotate_and_store(
    qkv: torch.Tensor, cache: torch.Tensor, frequencies: torch.Tensor | None,
    metadata: torch.Tensor, sequences: torch.Tensor, tokens: torch.Tensor, pointers: torch.Tensor,
) -> None:  # fmt: skip
    """Rotates q in place, by halves, and writes rotated k and plain v into the cache, of all sequences of more than
    one new token; the others' rows and places are left alone.

    Args:
        qkv: [n_tokens, (q_heads + 2 · kv_heads) · head_size], rows contiguous; rows beyond the batch's are left alone.
        cache: one layer, [blocks, block_size, 2, kv_heads, head_size].
        frequencies: fp32 [rotary dimensions / 2], a pair's angle per position; None rotates nothing.
        metadata, sequences, tokens, pointers: as in the package's docstring.
    """
    _, page, _, kv_heads, head_size = cache.shape
    q_heads = qkv.shape[1] // head_size - 2 * kv_heads
    half = 0 if frequencies is None else len(frequencies)
    heads = 2 * kv_heads if half == 0 else q_heads + 2 * kv_heads
    overlapped = overlap.supported(qkv.device)
    _rotary_kernel[(len(qkv), -(-heads // HEADS))](
        qkv, cache, frequencies, metadata, sequences, tokens, pointers,
        qkv.stride(0), cache.stride(0), cache.stride(1),
        Q_HEADS=q_heads, KV_HEADS=kv_heads, HEAD=head_size, PAGE=page, HALF=half,
        HEADS=HEADS, PAIRS=plan.power_of_two(max(half, 1)), REST=plan.power_of_two(max(head_size - 2 * half, 1)),
        OVERLAP=overlapped, num_warps=4, launch_pdl=overlapped,
    )  # fmt: skip
