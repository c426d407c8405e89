"""Random ragged batches over a blocked cache, and what attention makes of them in fp64."""

from __future__ import annotations

import dataclasses
import math

import torch

#: (tokens, tokens seen before) of each sequence. Blocks hold 64 or 128 tokens.
DECODE = {
    "first tokens": [(1, 0), (1, 0)],
    "mixed lengths": [(1, 5), (1, 200), (1, 63), (1, 450)],
    "blocks just full": [(1, 63), (1, 127), (1, 128), (1, 64)],
}
PREFILL = {
    "prompts": [(5, 0), (64, 0), (130, 0), (1, 0)],
    "later parts": [(64, 64), (3, 125), (17, 200), (128, 1)],
    "mixed": [(1, 100), (40, 0), (1, 64), (2, 62), (1, 0), (33, 31)],
}


@dataclasses.dataclass
class Batch:
    """A ragged batch on a device, as FastGen lays it out; ``cache`` is one layer's."""

    q_heads: int
    lengths: list[tuple[int, int]]
    qkv: torch.Tensor
    cache: torch.Tensor
    block_lists: torch.Tensor
    metadata: torch.Tensor
    sequences: torch.Tensor
    tokens: torch.Tensor
    pointers: torch.Tensor

    @property
    def q(self) -> torch.Tensor:
        return self.qkv[:, : self.q_heads * self.cache.shape[-1]]


def make(
    lengths: list[tuple[int, int]], q_heads: int, kv_heads: int, head_size: int, block_size: int,
    dtype: torch.dtype, device: str = "cpu", seed: int = 0, written: bool = True,
) -> Batch:  # fmt: skip
    """A batch of (tokens, seen) sequences with blocks in random order; what no token has written is NaN.

    ``written``: the batch's own keys and values are in the cache already.
    """
    generator = torch.Generator().manual_seed(seed)
    counts = [math.ceil((n + seen) / block_size) for n, seen in lengths]
    order = torch.randperm(sum(counts) + 3, generator=generator).tolist()
    block_lists = torch.full((len(lengths), max(counts) + 1), -1, dtype=torch.int32)
    cache = torch.full((len(order), block_size, 2, kv_heads, head_size), float("nan"), dtype=dtype)
    n_tokens = sum(n for n, _ in lengths)
    qkv = torch.randn((n_tokens, (q_heads + 2 * kv_heads) * head_size), generator=generator).to(dtype)
    sequences, tokens, first = [], [], 0
    for i, ((n, seen), count) in enumerate(zip(lengths, counts)):
        block_lists[i, :count] = torch.tensor([order.pop() for _ in range(count)], dtype=torch.int32)
        extent = n + seen if written else seen
        filled = torch.randn((extent, 2, kv_heads, head_size), generator=generator).to(dtype)
        for start in range(0, extent, block_size):
            part = filled[start : start + block_size]
            cache[block_lists[i, start // block_size], : len(part)] = part
        sequences.append([first, n, seen, 0])
        tokens += [i] * n
        first += n
    block_lists = block_lists.to(device)
    pointers = [block_lists[i].data_ptr() for i in range(len(lengths))]
    int32 = {"dtype": torch.int32, "device": device}
    return Batch(
        q_heads, lengths, qkv.to(device), cache.to(device), block_lists,
        torch.tensor([n_tokens, len(lengths)], **int32), torch.tensor(sequences, **int32),
        torch.tensor(tokens, **int32), torch.tensor(pointers, dtype=torch.int64, device=device),
    )  # fmt: skip


def attention(batch: Batch, scale: float, window: int | None = None) -> torch.Tensor:
    """fp64 [n_tokens, q_heads · head_size] from what is in the cache."""
    _, block_size, _, kv_heads, head_size = batch.cache.shape
    group = batch.q_heads // kv_heads
    out, first = [], 0
    for i, (n, seen) in enumerate(batch.lengths):
        extent = n + seen
        ids = batch.block_lists[i, : math.ceil(extent / block_size)].long()
        stored = batch.cache[ids].reshape(-1, 2, kv_heads, head_size)[:extent].double()
        keys, values = stored.repeat_interleave(group, dim=2).unbind(1)
        query = batch.q[first : first + n].reshape(n, batch.q_heads, head_size).double()
        score = torch.einsum("qhd,khd->hqk", query, keys) * scale
        distance = torch.arange(seen, extent).unsqueeze(1) - torch.arange(extent)
        visible = (distance >= 0) & (distance < (window or extent))
        weight = score.masked_fill(~visible.to(score.device), -math.inf).softmax(-1)
        out.append(torch.einsum("hqk,khd->qhd", weight, values).reshape(n, -1))
        first += n
    return torch.cat(out)


def split(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values of ``batch.qkv``, [n_tokens, heads, head_size] each."""
    kv_heads, head_size = batch.cache.shape[-2:]
    rows = batch.qkv.reshape(len(batch.qkv), -1, head_size)
    return rows.split([batch.q_heads, kv_heads, kv_heads], 1)


def positions(batch: Batch) -> torch.Tensor:
    """int64 [n_tokens]: where each token stands in its sequence."""
    return torch.cat([torch.arange(seen, seen + n) for n, seen in batch.lengths]).to(batch.qkv.device)


def frequencies(pairs: int, device: str) -> torch.Tensor | None:
    """fp32 [pairs], as LLaMA's; None for no pairs."""
    return (1e4 ** -(torch.arange(pairs) / pairs)).float().to(device) if pairs else None


def rotated(x: torch.Tensor, positions: torch.Tensor, frequencies: torch.Tensor | None) -> torch.Tensor:
    """[n, heads, size] rotated by halves, in fp32, rounded once."""
    if frequencies is None:
        return x
    half = len(frequencies)
    angles = positions.float().unsqueeze(1) * frequencies
    cos, sin = angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)
    a, b, kept = x.float().split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, kept], dim=-1).to(x.dtype)


def after(batch: Batch, frequencies: torch.Tensor | None, singles: bool) -> Batch:
    """The batch once q is rotated and its keys and values are in the cache, for ``singles`` or for all others."""
    q, k, v = split(batch)
    at = positions(batch)
    counts = torch.tensor([n for n, _ in batch.lengths], device=at.device)[batch.tokens.long()]
    ours = (counts == 1) == singles
    block_size = batch.cache.shape[1]
    qkv = torch.cat([rotated(q, at, frequencies), rotated(k, at, frequencies), v], 1)
    cache = batch.cache.clone()
    blocks, places = batch.block_lists[batch.tokens.long(), at // block_size].long()[ours], (at % block_size)[ours]
    cache[blocks, places, 0], cache[blocks, places, 1] = rotated(k, at, frequencies)[ours], v[ours]
    return dataclasses.replace(batch, qkv=qkv.reshape(len(qkv), -1), cache=cache)


#: Largest error allowed, relative to the largest value: a few roundings of the weights and of the result.
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference over the largest expected value; infinite where something is not a number."""
    difference = (found.double() - expected).abs().max().item() / expected.abs().max().item()
    return difference if math.isfinite(difference) else math.inf
