"""A decode step's attention in one launch: rotary embedding, cache write, and attention of one query a sequence.

The keys of a sequence are spread over several programs (flash-decoding), the last of which to finish adds up.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from ds_fp6.triton_ops import overlap, plan
from ds_fp6.triton_ops.decode_keys import attend_apart, attend_at_once, attend_together, prefetch, take_new


@triton.jit(do_not_specialize=["window", "program_tiles"])
def _decode_kernel(
    out,  # [n_tokens, q_heads · HEAD]
    qkv,  # [n_tokens, (q_heads + 2 · kv_heads) · HEAD]: queries, keys, values as the linear layer made them
    cache,  # one layer's; gets the keys, rotated, and the values
    frequencies,  # fp32 [HALF]: a pair's angle at position 1
    sequences, pointers,  # the ragged batch's
    partials,  # fp32 [n_seqs, kv_heads, splits, GROUP, HEAD]: sums of weighted values
    maxima, sums,  # fp32 [n_seqs, kv_heads, splits, GROUP]: of the scores (base 2) and of their weights
    counters,  # int32 [n_seqs, kv_heads]: programs that have finished; zero before and after
    qkv_stride, out_stride, block_stride, token_stride,
    scale,  # softmax scale · log2(e)
    window,  # positions that a query sees, where WINDOWED
    program_tiles,  # tiles of keys that a program gets, about
    GROUP: tl.constexpr, HEAD: tl.constexpr, PAGE: tl.constexpr,
    HALF: tl.constexpr,  # pairs of a head that are rotated: channel c with channel c + HALF; 0 is no rotation
    ROWS: tl.constexpr, KEYS: tl.constexpr, COLUMNS: tl.constexpr, WINDOWED: tl.constexpr,
    APART: tl.constexpr,  # warps that have keys of their own; 0: all share each tile
    AT_ONCE: tl.constexpr,  # tiles up to which a program holds all of its keys and values
    MEMBERS: tl.constexpr, PARTS: tl.constexpr, AHEAD: tl.constexpr, OVERLAP: tl.constexpr,
    COMPILED: tl.constexpr,  # rather than interpreted, where there is no assembly
):  # fmt: skip
    if OVERLAP:
        gdc_launch_dependents()
    head, kv_heads = tl.program_id(0), tl.num_programs(0)
    split, splits = tl.program_id(1), tl.num_programs(1)
    sequence = tl.program_id(2)
    token = tl.load(sequences + sequence * 4)
    queries = tl.load(sequences + sequence * 4 + 1)
    seen = tl.load(sequences + sequence * 4 + 2)
    if queries != 1:
        return

    # This program's tiles of the keys that earlier steps have left. The last program takes the new one too.
    first = tl.maximum(seen + 1 - window, 0) if WINDOWED else 0
    first_tile = first // KEYS
    tiles = tl.cdiv(seen, KEYS) - first_tile
    wanted = tl.maximum(tl.minimum((tiles + program_tiles // 2) // program_tiles, splits), 1)
    tiles_each = tl.maximum(tl.cdiv(tiles, wanted), 1)
    programs = tl.maximum(tl.cdiv(tiles, tiles_each), 1)
    if split >= programs:
        return
    is_last = split == programs - 1
    begin = first_tile + split * tiles_each
    end = tl.minimum(begin + tiles_each, first_tile + tiles)

    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    inside = column < HEAD
    real = (row < GROUP)[:, None] & inside[None, :]
    blocks = tl.load(pointers + sequence).to(tl.pointer_type(tl.int32))
    new_block = tl.load(blocks + seen // PAGE)
    # Block numbers are read a step ahead: were they part of the step, Triton would pipeline them and not the keys.
    block = tl.load(blocks + begin * KEYS // PAGE)
    cosine, sine = tl.full((COLUMNS,), 1.0, tl.float32), tl.zeros((COLUMNS,), tl.float32)
    if HALF > 0:
        turns = column < 2 * HALF
        pair = tl.where(column < HALF, column, column - HALF)
        angle = seen.to(tl.float32) * tl.load(frequencies + pair, mask=turns, other=0.0)
        cosine, sine = tl.cos(angle), tl.sin(angle)
        sine = tl.where(column < HALF, -sine, sine)

    at_once = (end > begin) & (end - begin <= AT_ONCE) if AT_ONCE else False
    if at_once:
        total, weight_sum, maximum = attend_at_once(
            qkv, token, qkv_stride, cosine, sine, new_block, is_last, cache, blocks, begin, end, first, seen, head,
            kv_heads, block_stride, token_stride, scale,
            GROUP, HEAD, HALF, PAGE, ROWS, KEYS, COLUMNS, WINDOWED, OVERLAP, COMPILED,
        )  # fmt: skip
    else:
        if OVERLAP:
            if end > begin:
                prefetch(
                    cache, blocks, begin * KEYS, tl.minimum(end * KEYS, seen), head * HEAD, kv_heads * HEAD,
                    block_stride, token_stride, HEAD, PAGE, AHEAD,
                )  # fmt: skip
        query, new_score, new_value = take_new(
            qkv, token, qkv_stride, cosine, sine, new_block, is_last, cache, seen, head, kv_heads, block_stride,
            token_stride, scale, GROUP, HEAD, HALF, PAGE, ROWS, COLUMNS, OVERLAP, COMPILED,
        )  # fmt: skip
        if APART:
            total, weight_sum, maximum = attend_apart(
                query, new_score, new_value, is_last, cache, blocks, block, begin, end, first, seen,
                head * HEAD, kv_heads * HEAD, block_stride, token_stride, scale,
                HEAD, PAGE, ROWS, KEYS, COLUMNS, WINDOWED, APART,
            )  # fmt: skip
        else:
            total, weight_sum, maximum = attend_together(
                query, new_score, new_value, is_last, cache, blocks, block, begin, end, first, seen,
                head * HEAD, kv_heads * HEAD, block_stride, token_stride, scale,
                HEAD, PAGE, ROWS, KEYS, COLUMNS, WINDOWED,
            )  # fmt: skip

    out_at = out + token.to(tl.int64) * out_stride + head * GROUP * HEAD
    if programs == 1:
        result = total * (1.0 / weight_sum)[:, None]
        tl.store(out_at + row[:, None] * HEAD + column[None, :], result.to(out.dtype.element_ty), mask=real)
        return

    group = sequence * kv_heads + head
    mine = (group * splits + split) * GROUP
    tl.store(partials + (mine + row)[:, None] * HEAD + column[None, :], total, mask=real)
    tl.store(maxima + mine + row, maximum, mask=row < GROUP)
    tl.store(sums + mine + row, weight_sum, mask=row < GROUP)
    # All threads' stores come before the count, which publishes them.
    tl.debug_barrier()
    finished = tl.atomic_add(counters + group, 1, sem="acq_rel", scope="gpu")
    if finished == programs - 1:
        tl.store(counters + group, 0)
        _add_up(
            out_at, partials, maxima, sums, group * splits * GROUP, programs, GROUP, HEAD, MEMBERS, COLUMNS, PARTS
        )  # fmt: skip


@triton.jit
def _add_up(
    out_at, partials, maxima, sums, start, programs,
    GROUP: tl.constexpr, HEAD: tl.constexpr, MEMBERS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Adds up the partial results of a sequence and key/value head, whose rows begin at ``start``, in their order.

    Every thread has the same channels of all parts, so that none waits for another. PARTS of them are read at a time,
    past the L1 cache.
    """
    member, column = tl.arange(0, MEMBERS), tl.arange(0, COLUMNS)
    is_member = member < GROUP
    inside = is_member[:, None] & (column < HEAD)[None, :]
    within = member[:, None] * HEAD + column[None, :]
    # Rows beyond the group have a maximum of 0 and sums of 0.
    maximum = tl.where(is_member, float("-inf"), 0.0)
    weight_sum = tl.zeros((MEMBERS,), tl.float32)
    total = tl.zeros((MEMBERS, COLUMNS), tl.float32)
    for part in range(0, programs, PARTS):
        new_maximum = maximum
        for i in tl.static_range(PARTS):
            there = is_member & (tl.full((MEMBERS,), part + i, tl.int32) < programs)
            at = maxima + start + (part + i) * GROUP + member
            new_maximum = tl.maximum(
                new_maximum, tl.load(at, mask=there, other=float("-inf"), cache_modifier=".cg")
            )  # fmt: skip
        correction = tl.exp2(maximum - new_maximum)
        weight_sum *= correction
        total *= correction[:, None]
        maximum = new_maximum
        for i in tl.static_range(PARTS):
            there = is_member & (tl.full((MEMBERS,), part + i, tl.int32) < programs)
            rows = start + (part + i) * GROUP
            highest = tl.load(maxima + rows + member, mask=there, other=float("-inf"), cache_modifier=".cg")
            weight = tl.load(sums + rows + member, mask=there, other=0.0, cache_modifier=".cg")
            values = tl.load(
                partials + rows * HEAD + within, mask=inside & there[:, None], other=0.0, cache_modifier=".cg"
            )  # fmt: skip
            factor = tl.exp2(highest - maximum)
            weight_sum += weight * factor
            total += values * factor[:, None]
    tl.store(out_at + within, (total * (1.0 / weight_sum)[:, None]).to(out_at.dtype.element_ty), mask=inside)


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


def constants(
    group: int, head_size: int, page: int, half: int, windowed: bool, tile: plan.Tile, overlapped: bool
) -> dict[str, int | bool]:  # fmt: skip
    """What the kernel is compiled for."""
    members, columns = plan.power_of_two(group), plan.power_of_two(head_size)
    return {
        "GROUP": group, "HEAD": head_size, "PAGE": page, "HALF": half, "WINDOWED": windowed, "OVERLAP": overlapped,
        "ROWS": tile.rows, "KEYS": tile.keys, "COLUMNS": columns,
        "APART": tile.warps if tile.apart else 0, "MEMBERS": members,
        "PARTS": plan.parts(members, columns, tile.warps), "AHEAD": plan.PREFETCHED_KEYS,
        # Masks of a head that is no power of two would need registers as well.
        "AT_ONCE": plan.AT_ONCE if tile.apart and head_size == columns else 0,
        "COMPILED": not triton.knobs.runtime.interpret,
    }  # fmt: skip


def decode_attention(
    out: torch.Tensor, qkv: torch.Tensor, cache: torch.Tensor, frequencies: torch.Tensor | None,
    sequences: torch.Tensor, pointers: torch.Tensor, scale: float, window: int | None, workspace: DecodeWorkspace,
    splits: int | None = None, tile: plan.Tile | None = None, program_keys: int = plan.PROGRAM_KEYS,
) -> None:  # fmt: skip
    """``softmax(scale · q kᵀ) v`` of every sequence of the batch that has one query, with q and k rotated by halves.

    The rotated k and v are written into the cache; ``qkv`` stays as it is. Rows and places of sequences with more
    queries are left alone.

    Args:
        out: [n_tokens, q_heads · head_size], fp16 or bf16; rows may be strided.
        qkv: [n_tokens, (q_heads + 2 · kv_heads) · head_size] of the same type; rows may be strided.
        cache: one layer, [blocks, block_size, 2, kv_heads, head_size], with the keys and values of earlier steps.
        frequencies: fp32 [rotary dimensions / 2], a pair's angle per position; None rotates nothing.
        sequences, pointers: as in the package's docstring, n_seqs rows each.
        window: a query sees the last ``window`` positions up to its own; None is all of them.
        splits, tile, program_keys: override the plan's.

    Raises ``ValueError`` for a batch that the workspace is too small for.
    """
    _, page, _, kv_heads, head_size = cache.shape
    n, group = len(sequences), qkv.shape[1] // (kv_heads * head_size) - 2
    tile = tile or plan.decode_tile(head_size, group, page)
    splits = splits or plan.splits(n, kv_heads)
    overlapped = overlap.supported(qkv.device)
    if n * kv_heads > workspace.counters.numel() or (
        splits > 1 and n * kv_heads * splits * group > workspace.sums.numel()
    ):
        raise ValueError(f"the workspace has no room for {n} sequences, {kv_heads} heads and {splits} splits")
    half = 0 if frequencies is None else len(frequencies)
    _decode_kernel[(kv_heads, splits, n)](
        out, qkv, cache, frequencies, sequences, pointers,
        workspace.partials, workspace.maxima, workspace.sums, workspace.counters,
        qkv.stride(0), out.stride(0), cache.stride(0), cache.stride(1),
        scale * math.log2(math.e), window or 0, max(1, program_keys // tile.keys),
        **constants(group, head_size, page, half, bool(window), tile, overlapped),
        num_warps=tile.warps, num_stages=tile.stages, launch_pdl=overlapped,
    )  # fmt: skip
