"""Attention of one query a sequence, spread over the keys (flash-decoding), in one launch."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ds_fp6.triton_ops import overlap, plan


@triton.jit(do_not_specialize=["window"])
def _decode_kernel(
    out, q, cache,  # [n_tokens, q_heads · HEAD] twice, the second strided; one layer's cache
    sequences, pointers,  # the ragged batch's
    partials,  # fp32 [n_seqs, kv_heads, splits, GROUP, HEAD]: sums of weighted values
    maxima, sums,  # fp32 [n_seqs, kv_heads, splits, GROUP]: of the scores (base 2) and of their weights
    counters,  # int32 [n_seqs, kv_heads]: programs that have finished; zero before and after
    q_stride, out_stride, block_stride, token_stride,
    scale,  # softmax scale · log2(e)
    window,  # positions that a query sees, where WINDOWED
    GROUP: tl.constexpr, HEAD: tl.constexpr, PAGE: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, COLUMNS: tl.constexpr, WINDOWED: tl.constexpr,
    MEMBERS: tl.constexpr, PARTS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        gdc_launch_dependents()
    head, kv_heads = tl.program_id(0), tl.num_programs(0)
    split, splits = tl.program_id(1), tl.num_programs(1)
    sequence = tl.program_id(2)
    token = tl.load(sequences + sequence * 4)
    queries = tl.load(sequences + sequence * 4 + 1)
    length = tl.load(sequences + sequence * 4 + 2) + 1
    if queries != 1:
        return

    # This program's tiles of keys.
    first = tl.maximum(length - window, 0) if WINDOWED else 0
    first_tile = first // KEYS
    tiles = tl.cdiv(length, KEYS) - first_tile
    tiles_each = tl.cdiv(tiles, splits)
    programs = tl.cdiv(tiles, tiles_each)
    if split >= programs:
        return
    begin = first_tile + split * tiles_each
    end = tl.minimum(begin + tiles_each, first_tile + tiles)

    row, column, key = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, KEYS)
    real = (row < GROUP)[:, None] & (column < HEAD)[None, :]
    blocks = tl.load(pointers + sequence).to(tl.pointer_type(tl.int32))
    # Block numbers are read a step ahead: were they part of the step, Triton would pipeline them and not the keys.
    block = tl.load(blocks + begin * KEYS // PAGE)
    if OVERLAP:
        gdc_wait()
    q_at = q + token.to(tl.int64) * q_stride + (head * GROUP + row)[:, None] * HEAD + column[None, :]
    query = tl.load(q_at, mask=real, other=0.0)
    within = key[:, None] * token_stride + head * HEAD + column[None, :]

    maximum = tl.full((ROWS,), float("-inf"), tl.float32)
    weight_sum = tl.zeros((ROWS,), tl.float32)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for tile in range(begin, end):
        start = tile * KEYS
        tile_at = cache + block.to(tl.int64) * block_stride + (start % PAGE) * token_stride + within
        block = tl.load(blocks + tl.minimum(tile + 1, end - 1) * KEYS // PAGE)
        # What lies behind the sequence's end was never written and may be NaN.
        there = (start + key < length)[:, None] & (column < HEAD)[None, :]
        keys = tl.load(tile_at, mask=there, other=0.0)
        values = tl.load(tile_at + kv_heads * HEAD, mask=there, other=0.0)
        score = tl.dot(query, tl.trans(keys)) * scale
        visible = start + key < length
        if WINDOWED:
            visible &= start + key >= first
        score = tl.where(visible[None, :], score, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(score, 1))
        correction = tl.exp2(maximum - new_maximum)
        weight = tl.exp2(score - new_maximum[:, None])
        weight_sum = weight_sum * correction + tl.sum(weight, 1)
        total = tl.dot(weight.to(values.dtype), values, total * correction[:, None])
        maximum = new_maximum

    out_at = out + token.to(tl.int64) * out_stride + head * GROUP * HEAD
    if programs == 1:
        result = total / weight_sum[:, None]
        tl.store(out_at + row[:, None] * HEAD + column[None, :], result.to(out.dtype.element_ty), mask=real)
        return

    pair = sequence * kv_heads + head
    mine = (pair * splits + split) * GROUP
    tl.store(partials + (mine + row)[:, None] * HEAD + column[None, :], total, mask=real)
    tl.store(maxima + mine + row, maximum, mask=row < GROUP)
    tl.store(sums + mine + row, weight_sum, mask=row < GROUP)
    # All threads' stores come before the count, which publishes them.
    tl.debug_barrier()
    finished = tl.atomic_add(counters + pair, 1, sem="acq_rel", scope="gpu")
    if finished != programs - 1:
        return

    # The last program of a sequence and head adds the partial results up, PARTS of them at a time.
    tl.store(counters + pair, 0)
    number, member = tl.arange(0, PARTS), tl.arange(0, MEMBERS)
    inside = (member < GROUP)[:, None] & (column < HEAD)[None, :]
    within = member[:, None] * HEAD + column[None, :]
    all_maximum = tl.full((MEMBERS,), float("-inf"), tl.float32)
    all_sum = tl.zeros((MEMBERS,), tl.float32)
    all_total = tl.zeros((MEMBERS, COLUMNS), tl.float32)
    for begin_part in range(0, programs, PARTS):
        part = begin_part + number
        live = (part < programs)[:, None] & (member < GROUP)[None, :]
        rows = (pair * splits + part) * GROUP
        totals = tl.load(
            partials + (rows * HEAD)[:, None, None] + within[None, :, :],
            mask=(part < programs)[:, None, None] & inside[None, :, :], other=0.0, cache_modifier=".cg",
        )  # fmt: skip
        highest = tl.load(
            maxima + rows[:, None] + member[None, :], mask=live, other=float("-inf"), cache_modifier=".cg"
        )  # fmt: skip
        weights = tl.load(sums + rows[:, None] + member[None, :], mask=live, other=0.0, cache_modifier=".cg")
        new_maximum = tl.maximum(all_maximum, tl.max(highest, 0))
        # Rows beyond the group have seen nothing.
        safe = tl.where(member < GROUP, new_maximum, 0.0)
        correction = tl.exp2(all_maximum - safe)
        factor = tl.exp2(highest - safe[None, :])
        all_sum = all_sum * correction + tl.sum(weights * factor, 0)
        all_total = all_total * correction[:, None] + tl.sum(totals * factor[:, :, None], 0)
        all_maximum = new_maximum
    tl.store(out_at + within, (all_total / all_sum[:, None]).to(out.dtype.element_ty), mask=inside)


class DecodeWorkspace:
    """Where programs leave partial results: for batches of up to ``max_sequences``, allocated once.

    Launches that share a workspace must follow one another on a stream.
    """

    def __init__(
        self, max_sequences: int, kv_heads: int, group: int, head_size: int, device: torch.device | str,
        partials: int | None = None,
    ) -> None:  # fmt: skip
        count = plan.most_partials(max_sequences, kv_heads) if partials is None else partials
        self.partials = torch.empty((count * group * head_size,), dtype=torch.float32, device=device)
        self.maxima = torch.empty((count * group,), dtype=torch.float32, device=device)
        self.sums = torch.empty((count * group,), dtype=torch.float32, device=device)
        self.counters = torch.zeros((max_sequences * kv_heads,), dtype=torch.int32, device=device)


def decode_attention(
    out: torch.Tensor, q: torch.Tensor, cache: torch.Tensor, sequences: torch.Tensor, pointers: torch.Tensor,
    scale: float, window: int | None, workspace: DecodeWorkspace,
    splits: int | None = None, tile: plan.Tile | None = None,
) -> None:  # fmt: skip
    """``softmax(scale · q kᵀ) v`` for every sequence of the batch that has one query; the others' rows are left alone.

    Args:
        out, q: [n_tokens, q_heads · head_size], fp16 or bf16; rows may be strided.
        cache: one layer, [blocks, block_size, 2, kv_heads, head_size], with the query's own key and value in it.
        sequences, pointers: as in the package's docstring, n_seqs rows each.
        window: a query sees the last ``window`` positions up to its own; None is all of them.
        splits, tile: override the plan's.

    Raises ``ValueError`` for a batch that the workspace is too small for.
    """
    _, page, _, kv_heads, head_size = cache.shape
    n, group = len(sequences), q.shape[1] // (kv_heads * head_size)
    tile = tile or plan.decode_tile(head_size, group, page)
    splits = splits or plan.splits(n, kv_heads)
    overlapped = overlap.supported(q.device)
    if n * kv_heads > workspace.counters.numel() or (
        splits > 1 and n * kv_heads * splits * group > workspace.sums.numel()
    ):
        raise ValueError(f"the workspace has no room for {n} sequences, {kv_heads} heads and {splits} splits")
    members, columns = plan.power_of_two(group), plan.power_of_two(head_size)
    _decode_kernel[(kv_heads, splits, n)](
        out, q, cache, sequences, pointers,
        workspace.partials, workspace.maxima, workspace.sums, workspace.counters,
        q.stride(0), out.stride(0), cache.stride(0), cache.stride(1),
        scale * math.log2(math.e), window or 0,
        GROUP=group, HEAD=head_size, PAGE=page, ROWS=tile.rows, KEYS=tile.keys,
        COLUMNS=columns, WINDOWED=bool(window),
        MEMBERS=members, PARTS=plan.parts(members, columns), OVERLAP=overlapped,
        num_warps=tile.warps, num_stages=tile.stages, launch_pdl=overlapped,
    )  # fmt: skip
