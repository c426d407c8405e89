"""Attention over the blocked KV cache.

An atom describes a run of queries of one sequence, 32 bytes: int64 address of the sequence's int32 list of cache
blocks, then int32 first query in the batch, queries, cache blocks, end of the visible cache, position of the first
query in the sequence, unused. Query i of an atom sees the cache up to position ``global + i``.
"""

from __future__ import annotations

import struct

import torch
import torch.nn.functional as F

from ds_fp6.cpu.ragged_ops import block_list

_ATOM = struct.Struct("=q6i")

#: Queries in an atom. A GPU splits long prompts over its multiprocessors this way; threads split them better later.
Q_BLOCK = 1 << 30


def kv_block_size(head_size: int) -> int:
    """Tokens in a block of the KV cache."""
    return 128 if head_size <= 64 else 64


def build_atoms(
    atoms: torch.Tensor, batch: torch.Tensor, sequences: torch.Tensor, pointers: torch.Tensor, q_block: int, block: int
) -> int:
    """Fills int32 ``atoms`` [n, 8] with the batch's atoms of at most ``q_block`` queries; returns how many.

    Raises ``ValueError`` if they do not fit.
    """
    n = int(batch[1])
    packed = bytearray()
    for (first, queries, seen, _), pointer in zip(sequences[:n].tolist(), pointers[:n].tolist()):
        for start in range(0, queries, q_block):
            length, position = min(q_block, queries - start), seen + start
            extent = position + length
            packed += _ATOM.pack(pointer, first + start, length, -(-extent // block), extent, position, 0)
    count = len(packed) // _ATOM.size
    if count > len(atoms):
        raise ValueError(f"the batch has {count} attention atoms, more than the {len(atoms)} that there is room for")
    if count:
        atoms[:count] = torch.frombuffer(packed, dtype=torch.int32).view(count, -1)
    return count


def flash_attn_by_atoms(
    out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, atoms: torch.Tensor, scale: float,
    causal: bool, window: int | None = None,
) -> None:
    """``softmax(scale · q kᵀ + mask) v`` for each atom.

    Args:
        out, q: [n_tokens, q_heads · head_size]; q may be strided.
        k, v: [blocks, block_size, kv_heads, head_size], one layer's cache. Head h reads kv head
            ``h · kv_heads // q_heads``.
        atoms: int32 [n, 8].
        causal: must be true; nothing else is asked for.
        window: a query sees the last ``window`` positions up to its own; None is all of them.
    """
    if not causal:
        raise NotImplementedError("only causal attention is implemented")
    _, _, kv_heads, size = k.shape
    for atom in atoms:
        first, queries, blocks, extent, position, _ = atom[2:].tolist()
        ids = block_list(int(atom[:2].view(torch.int64)), blocks).long()
        keys, values = (cache[ids].reshape(-1, kv_heads, size)[:extent].transpose(0, 1).float() for cache in (k, v))
        query = q[first : first + queries].reshape(queries, -1, size).transpose(0, 1).float()
        groups = query.shape[0] // kv_heads
        distance = torch.arange(position, position + queries).unsqueeze(1) - torch.arange(extent)
        visible = distance >= 0 if window is None else (distance >= 0) & (distance < window)
        y = F.scaled_dot_product_attention(
            query, keys.repeat_interleave(groups, 0), values.repeat_interleave(groups, 0),
            attn_mask=visible, scale=scale,
        )  # fmt: skip
        out[first : first + queries] = y.transpose(0, 1).reshape(queries, -1)
