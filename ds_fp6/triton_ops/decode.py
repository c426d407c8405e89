"""A decode step's attention in one launch: rotary embedding, cache write, and attention of one query a sequence.

The keys of a sequence are spread over several programs (flash-decoding), the last of which to finish adds up.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ds_fp6.triton_ops import overlap, plan
from ds_fp6.triton_ops.rotary import rotated


#: Scores of what is not visible: finite, so that a row that sees nothing of a tile stays a number until one that it
#: sees outweighs it.
_HIDDEN = tl.constexpr(-1.0e30)


@triton.jit
def _prefetch(
    cache, blocks, begin, end, offset, value_offset, block_stride, token_stride,
    HEAD: tl.constexpr, PAGE: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Asks the L2 cache for the first AHEAD of the keys and values at positions ``begin`` up to ``end``."""
    LINE: tl.constexpr = 128 // 2
    position = tl.minimum(begin + tl.arange(0, AHEAD), end - 1)
    block = tl.load(blocks + position // PAGE).to(tl.int64)
    at = cache + block * block_stride + (position % PAGE) * token_stride + offset
    for start in tl.static_range(0, HEAD, LINE):
        for kind in tl.static_range(2):
            address = (at + kind * value_offset + start).to(tl.int64)
            tl.inline_asm_elementwise(
                "{ prefetch.global.L2 [$1]; mov.u32 $0, 0; }", "=r,l", [address], tl.int32, is_pure=False, pack=1
            )  # fmt: skip


@triton.jit
def _attend_together(
    query, new_score, new_value, is_last, cache, blocks, block, begin, end, first, seen, offset, value_offset,
    block_stride, token_stride, scale,
    HEAD: tl.constexpr, PAGE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, COLUMNS: tl.constexpr,
    WINDOWED: tl.constexpr,
):  # fmt: skip
    """Tiles ``begin`` up to ``end`` of keys, each by all warps; the last program's new key has a weight of 1 at first.

    Returns weighted values [ROWS, COLUMNS], the weights' sum and the largest score [ROWS].
    """
    key, column = tl.arange(0, KEYS), tl.arange(0, COLUMNS)
    maximum = tl.where(is_last, new_score, _HIDDEN)
    # Kept a key of the tile and added up at the end: in each tile that would cost an exchange between warps.
    weight_sums = tl.where((key == 0)[None, :] & is_last, 1.0, tl.zeros((ROWS, KEYS), tl.float32))
    total = tl.where(is_last, new_value.to(tl.float32)[None, :], tl.zeros((ROWS, COLUMNS), tl.float32))
    within = offset + key[:, None] * token_stride + column[None, :]
    for tile in range(begin, end):
        start = tile * KEYS
        tile_at = cache + block.to(tl.int64) * block_stride + (start % PAGE) * token_stride + within
        block = tl.load(blocks + tl.minimum(tile + 1, end - 1) * KEYS // PAGE)
        # What lies behind was never written and may be NaN, or is the new key, which is being written.
        there = (start + key < seen)[:, None] & (column < HEAD)[None, :]
        keys = tl.load(tile_at, mask=there, other=0.0)
        values = tl.load(tile_at + value_offset, mask=there, other=0.0)
        score = tl.dot(query, tl.trans(keys)) * scale
        visible = start + key < seen
        if WINDOWED:
            visible &= start + key >= first
        score = tl.where(visible[None, :], score, _HIDDEN)
        new_maximum = tl.maximum(maximum, tl.max(score, 1))
        correction = tl.exp2(maximum - new_maximum)[:, None]
        weight = tl.exp2(score - new_maximum[:, None])
        weight_sums = weight_sums * correction + weight
        total = tl.dot(weight.to(values.dtype), values, total * correction)
        maximum = new_maximum
    return total, tl.sum(weight_sums, 1), maximum


@triton.jit
def _sum_of_warps(x, WARPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[WARPS, ROWS, COLUMNS] → [ROWS, COLUMNS]; a reduction would go through shared memory element by element."""
    x = tl.permute(x, (1, 2, 0))
    if WARPS == 4:
        even, odd = tl.split(tl.reshape(x, (ROWS, COLUMNS, 2, 2)))
        x = even + odd
    even, odd = tl.split(x)
    return even + odd


@triton.jit
def _attend_apart(
    query, new_score, new_value, is_last, cache, blocks, block, begin, end, first, seen, offset, value_offset,
    block_stride, token_stride, scale,
    HEAD: tl.constexpr, PAGE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, COLUMNS: tl.constexpr,
    WINDOWED: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """The same, but each warp has keys of its own in every tile: warps exchange nothing until the end."""
    EACH: tl.constexpr = KEYS // WARPS
    warp, column = tl.arange(0, WARPS), tl.arange(0, COLUMNS)
    key = warp[:, None] * EACH + tl.arange(0, EACH)[None, :]
    has_new = is_last & (warp == 0)
    maximum = tl.where(has_new[:, None], new_score[None, :], _HIDDEN)
    weight_sums = tl.where((key == 0)[:, None, :] & is_last, 1.0, tl.zeros((WARPS, ROWS, EACH), tl.float32))
    total = tl.where(
        has_new[:, None, None], new_value.to(tl.float32)[None, None, :], tl.zeros((WARPS, ROWS, COLUMNS), tl.float32)
    )  # fmt: skip
    queries = tl.broadcast_to(query[None, :, :], (WARPS, ROWS, COLUMNS))
    within = offset + key[:, :, None] * token_stride + column[None, None, :]
    for tile in range(begin, end):
        start = tile * KEYS
        tile_at = cache + block.to(tl.int64) * block_stride + (start % PAGE) * token_stride + within
        block = tl.load(blocks + tl.minimum(tile + 1, end - 1) * KEYS // PAGE)
        there = (start + key < seen)[:, :, None] & (column < HEAD)[None, None, :]
        keys = tl.load(tile_at, mask=there, other=0.0)
        values = tl.load(tile_at + value_offset, mask=there, other=0.0)
        score = tl.dot(queries, tl.permute(keys, (0, 2, 1))) * scale
        visible = start + key < seen
        if WINDOWED:
            visible &= start + key >= first
        score = tl.where(visible[:, None, :], score, _HIDDEN)
        new_maximum = tl.maximum(maximum, tl.max(score, 2))
        correction = tl.exp2(maximum - new_maximum)[:, :, None]
        weight = tl.exp2(score - new_maximum[:, :, None])
        weight_sums = weight_sums * correction + weight
        total = tl.dot(weight.to(values.dtype), values, total * correction)
        maximum = new_maximum
    highest = tl.max(maximum, 0)
    factor = tl.exp2(maximum - highest[None, :])
    weight_sum = tl.sum(tl.sum(weight_sums, 2) * factor, 0)
    return _sum_of_warps(total * factor[:, :, None], WARPS, ROWS, COLUMNS), weight_sum, highest


@triton.jit
def _as_loaded(x):
    """``x``, 16 bits each. Triton likes to hand values around between threads right after their load, with barriers that
    keep the next load from being under way at the same time; it hands nothing around before this.
    """
    return tl.inline_asm_elementwise("", "=h,0", [x], x.dtype, is_pure=False, pack=1)


@triton.jit
def _take_new(
    qkv, token, qkv_stride, cosine, sine, new_block, is_last, cache, seen, head, kv_heads, block_stride, token_stride,
    scale,
    GROUP: tl.constexpr, HEAD: tl.constexpr, HALF: tl.constexpr, PAGE: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, OVERLAP: tl.constexpr, COMPILED: tl.constexpr,
):  # fmt: skip
    """Waits for what this step has made, and rotates it: the group's queries [ROWS, COLUMNS], the new key's scores
    [ROWS] and the new value [COLUMNS]. The last program of a sequence writes key and value into the cache.
    """
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    inside = column < HEAD
    real = (row < GROUP)[:, None] & inside[None, :]
    if OVERLAP:
        gdc_wait()
    q_at = qkv + token.to(tl.int64) * qkv_stride + head * GROUP * HEAD + row[:, None] * HEAD
    k_at = qkv + token.to(tl.int64) * qkv_stride + (kv_heads * GROUP + head) * HEAD
    query = tl.load(q_at + column[None, :], mask=real, other=0.0)
    new_key = tl.load(k_at + column, mask=inside, other=0.0)
    new_value = tl.load(k_at + kv_heads * HEAD + column, mask=inside, other=0.0)
    if HALF > 0:
        # Channels of a pair stand HALF apart; eight neighbours have eight neighbours as their others.
        other = tl.where(column < HALF, column + HALF, column - HALF)
        if HALF % 8 == 0:
            other = tl.max_contiguous(tl.multiple_of(other, 8), 8)
        turns = column < 2 * HALF
        other_query = tl.load(q_at + other[None, :], mask=real & turns[None, :], other=0.0)
        other_key = tl.load(k_at + other, mask=turns, other=0.0)
        query = rotated(query, other_query, cosine[None, :], sine[None, :])
        new_key = rotated(new_key, other_key, cosine, sine)
    if COMPILED:
        query, new_key, new_value = _as_loaded(query), _as_loaded(new_key), _as_loaded(new_value)
    new_at = cache + new_block.to(tl.int64) * block_stride + (seen % PAGE) * token_stride + head * HEAD + column
    # NOTE: Triton 3.9's interpreter takes masks that a scalar condition is part of for integers, here and below.
    written = inside & (tl.full((COLUMNS,), is_last, tl.int32) != 0)
    tl.store(new_at, new_key, mask=written)
    tl.store(new_at + kv_heads * HEAD, new_value, mask=written)
    return query, tl.sum(query.to(tl.float32) * new_key.to(tl.float32)[None, :], 1) * scale, new_value


@triton.jit
def _tile(
    cache, blocks, tile, end, seen, offset, value_offset, block_stride, token_stride,
    HEAD: tl.constexpr, PAGE: tl.constexpr, KEYS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Keys and values [KEYS, COLUMNS] of a tile; zeros for one from ``end`` on."""
    key, column = tl.arange(0, KEYS), tl.arange(0, COLUMNS)
    start = tile * KEYS
    block = tl.load(blocks + tl.minimum(start, (end - 1) * KEYS) // PAGE)
    at = cache + block.to(tl.int64) * block_stride + (start % PAGE) * token_stride + offset
    at += key[:, None] * token_stride + column[None, :]
    there = (start + key < tl.minimum(seen, end * KEYS))[:, None] & (column < HEAD)[None, :]
    return tl.load(at, mask=there, other=0.0), tl.load(at + value_offset, mask=there, other=0.0)


@triton.jit
def _scores(query, keys, start, end, first, scale, WINDOWED: tl.constexpr):
    """[ROWS, KEYS] of keys at the positions from ``start`` on, of which those from ``end`` on are not there."""
    position = start + tl.arange(0, keys.shape[0])
    visible = position < end
    if WINDOWED:
        visible &= position >= first
    return tl.where(visible[None, :], tl.dot(query, tl.trans(keys)) * scale, _HIDDEN)


@triton.jit
def _attend_at_once(
    qkv, token, qkv_stride, cosine, sine, new_block, is_last, cache, blocks, begin, end, first, seen, head, kv_heads,
    block_stride, token_stride, scale,
    GROUP: tl.constexpr, HEAD: tl.constexpr, HALF: tl.constexpr, PAGE: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, COLUMNS: tl.constexpr, WINDOWED: tl.constexpr, OVERLAP: tl.constexpr, COMPILED: tl.constexpr,
):  # fmt: skip
    """The same for one to three tiles, which registers hold: they are there before this step's queries are."""
    offset, value_offset = head * HEAD, kv_heads * HEAD
    keys0, values0 = _tile(
        cache, blocks, begin, end, seen, offset, value_offset, block_stride, token_stride, HEAD, PAGE, KEYS, COLUMNS
    )  # fmt: skip
    keys1, values1 = _tile(
        cache, blocks, begin + 1, end, seen, offset, value_offset, block_stride, token_stride, HEAD, PAGE, KEYS, COLUMNS
    )  # fmt: skip
    keys2, values2 = _tile(
        cache, blocks, begin + 2, end, seen, offset, value_offset, block_stride, token_stride, HEAD, PAGE, KEYS, COLUMNS
    )  # fmt: skip
    query, new_score, new_value = _take_new(
        qkv, token, qkv_stride, cosine, sine, new_block, is_last, cache, seen, head, kv_heads, block_stride,
        token_stride, scale, GROUP, HEAD, HALF, PAGE, ROWS, COLUMNS, OVERLAP, COMPILED,
    )  # fmt: skip
    start, last = begin * KEYS, tl.minimum(seen, end * KEYS)
    score0 = _scores(query, keys0, start, last, first, scale, WINDOWED)
    score1 = _scores(query, keys1, start + KEYS, last, first, scale, WINDOWED)
    score2 = _scores(query, keys2, start + 2 * KEYS, last, first, scale, WINDOWED)
    new_score = tl.where(is_last, new_score, _HIDDEN)
    maximum = tl.maximum(new_score, tl.max(tl.maximum(tl.maximum(score0, score1), score2), 1))
    weight0 = tl.exp2(score0 - maximum[:, None])
    weight1 = tl.exp2(score1 - maximum[:, None])
    weight2 = tl.exp2(score2 - maximum[:, None])
    new_weight = tl.exp2(new_score - maximum)
    total = tl.dot(weight0.to(values0.dtype), values0)
    total = tl.dot(weight1.to(values1.dtype), values1, total)
    total = tl.dot(weight2.to(values2.dtype), values2, total)
    total += new_weight[:, None] * new_value.to(tl.float32)[None, :]
    return total, tl.sum(weight0 + weight1 + weight2, 1) + new_weight, maximum


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
        total, weight_sum, maximum = _attend_at_once(
            qkv, token, qkv_stride, cosine, sine, new_block, is_last, cache, blocks, begin, end, first, seen, head,
            kv_heads, block_stride, token_stride, scale,
            GROUP, HEAD, HALF, PAGE, ROWS, KEYS, COLUMNS, WINDOWED, OVERLAP, COMPILED,
        )  # fmt: skip
    else:
        if OVERLAP:
            if end > begin:
                _prefetch(
                    cache, blocks, begin * KEYS, tl.minimum(end * KEYS, seen), head * HEAD, kv_heads * HEAD,
                    block_stride, token_stride, HEAD, PAGE, AHEAD,
                )  # fmt: skip
        query, new_score, new_value = _take_new(
            qkv, token, qkv_stride, cosine, sine, new_block, is_last, cache, seen, head, kv_heads, block_stride,
            token_stride, scale, GROUP, HEAD, HALF, PAGE, ROWS, COLUMNS, OVERLAP, COMPILED,
        )  # fmt: skip
        if APART:
            total, weight_sum, maximum = _attend_apart(
                query, new_score, new_value, is_last, cache, blocks, block, begin, end, first, seen,
                head * HEAD, kv_heads * HEAD, block_stride, token_stride, scale,
                HEAD, PAGE, ROWS, KEYS, COLUMNS, WINDOWED, APART,
            )  # fmt: skip
        else:
            total, weight_sum, maximum = _attend_together(
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
