"""Host buffers, embeddings and the writing of keys and values into the blocked cache.

A ragged batch is described by
    M  int32 [2]          tokens and sequences in the batch
    S  int32 [n_seqs, 4]  first token, tokens, tokens seen before, unused
    T  int32 [n_tokens]   the sequence of each token
    P  int64 [n_seqs]     address of each sequence's int32 list of cache blocks
and the cache of one layer is [blocks, block_size, 2, kv_heads, head_size], keys before values.
"""

from __future__ import annotations

import ctypes
import math

import torch


def allocate_fast_host_buffer(device_tensor: torch.Tensor) -> torch.Tensor:
    """A host buffer like ``device_tensor``. Pinning has no meaning without a device to copy to."""
    return torch.empty_like(device_tensor, device="cpu")


def allocate_view_on(tensor: torch.Tensor, buffer: torch.Tensor, offset: int) -> torch.Tensor:
    """A view of ``tensor``'s shape and dtype at ``offset`` bytes into the uint8 ``buffer``."""
    return allocate_view_like(list(tensor.shape), list(tensor.stride()), tensor, buffer, offset)


def allocate_view_like(
    shape: list[int], strides: list[int], like: torch.Tensor, buffer: torch.Tensor, offset: int
) -> torch.Tensor:
    """A view of ``like``'s dtype, with ``shape`` and ``strides``, at ``offset`` bytes into the uint8 ``buffer``."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides)) if math.prod(shape) else 0
    raw = buffer[offset : offset + extent * like.element_size()].view(like.dtype)
    return raw.as_strided(list(shape), list(strides))


def block_list(address: int, count: int) -> torch.Tensor:
    """The first ``count`` cache blocks of a sequence, int32, from the address of its list."""
    return torch.frombuffer((ctypes.c_int32 * count).from_address(address), dtype=torch.int32)


def token_positions(sequences: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The position of each token in its sequence, int64 [n_tokens]."""
    first, _, seen, _ = sequences[tokens.long()].long().unbind(-1)
    return torch.arange(len(tokens)) - first + seen


def cache_slots(
    block_size: int, positions: torch.Tensor, sequences: torch.Tensor, tokens: torch.Tensor, pointers: torch.Tensor
) -> torch.Tensor:
    """Where each token goes in the cache, as ``block · block_size + offset``, int64 [n_tokens]."""
    slots = torch.empty_like(positions)
    for s, (first, count, seen, _) in enumerate(sequences.tolist()):
        if count:
            blocks = block_list(int(pointers[s]), -(-(seen + count) // block_size)).long()
            own = positions[first : first + count]
            slots[first : first + count] = blocks[own // block_size] * block_size + own % block_size
    return slots


def _write(
    cache: torch.Tensor, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor,
    sequences: torch.Tensor, tokens: torch.Tensor, pointers: torch.Tensor,
) -> None:
    _, block_size, _, heads, size = cache.shape
    slots = cache_slots(block_size, positions, sequences, tokens, pointers)
    block, offset = slots // block_size, slots % block_size
    cache[block, offset, 0] = k.reshape(-1, heads, size)
    cache[block, offset, 1] = v.reshape(-1, heads, size)


def inverse_frequencies(rotary_dim: int, theta: float) -> torch.Tensor:
    """``theta^(-2i / rotary_dim)``, fp32 [rotary_dim / 2], rounded as transformers rounds it."""
    return 1.0 / (theta ** (torch.arange(0, rotary_dim, 2, dtype=torch.int64).float() / rotary_dim))


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The first ``2 · cos.shape[-1]`` channels of each head rotated by halves, the others kept; fp32 inside."""
    half = cos.shape[-1]
    first, second, kept = x.float().split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, kept], dim=-1).to(x.dtype)


def kv_trained_rotary_embeddings(
    cache: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, inv_freq: torch.Tensor,
    batch: torch.Tensor, sequences: torch.Tensor, tokens: torch.Tensor, pointers: torch.Tensor,
) -> None:
    """Rotates q in place, and writes rotated k and plain v into the cache. ``inv_freq``: fp32 [rotary_dim / 2]."""
    size = cache.shape[-1]
    positions = token_positions(sequences, tokens)
    angles = positions.float().unsqueeze(1) * inv_freq.as_subclass(torch.Tensor)
    cos, sin = angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)
    q.copy_(_rotate(q.reshape(len(tokens), -1, size), cos, sin).reshape(q.shape))
    rotated = _rotate(k.reshape(len(tokens), -1, size), cos, sin)
    _write(cache, rotated, v, positions, sequences, tokens, pointers)


def kv_rotary_embeddings(
    cache: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rotary_dim: int, theta: float,
    batch: torch.Tensor, sequences: torch.Tensor, tokens: torch.Tensor, pointers: torch.Tensor,
) -> None:
    """``kv_trained_rotary_embeddings`` with the frequencies ``theta^(-2i / rotary_dim)``."""
    inv_freq = inverse_frequencies(rotary_dim, theta)
    kv_trained_rotary_embeddings(cache, q, k, v, inv_freq, batch, sequences, tokens, pointers)


def linear_kv_copy(
    cache: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    batch: torch.Tensor, sequences: torch.Tensor, tokens: torch.Tensor, pointers: torch.Tensor,
) -> None:
    """Writes k and v into the cache as they are."""
    _write(cache, k, v, token_positions(sequences, tokens), sequences, tokens, pointers)


def ragged_embed(
    out: torch.Tensor, ids: torch.Tensor, weight: torch.Tensor, position_weight: torch.Tensor | None, offset: int,
    batch: torch.Tensor, sequences: torch.Tensor, tokens: torch.Tensor, pointers: torch.Tensor,
) -> None:
    """``out = weight[ids] (+ position_weight[position + offset])``: out [n_tokens, dim].

    Raises ``IndexError`` for an id outside the vocabulary.
    """
    torch.index_select(weight.as_subclass(torch.Tensor), 0, ids, out=out)
    if position_weight is not None:
        positions = token_positions(sequences, tokens) + offset
        out += position_weight.as_subclass(torch.Tensor).index_select(0, positions)


def gather_for_logits(last: torch.Tensor, hidden: torch.Tensor, batch: torch.Tensor, sequences: torch.Tensor) -> None:
    """``last[s] = hidden[last token of sequence s]``: hidden [n_tokens, dim], last [n_seqs, dim]."""
    torch.index_select(hidden, 0, (sequences[:, 0] + sequences[:, 1] - 1).long(), out=last)
