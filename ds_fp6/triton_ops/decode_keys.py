"""What a program of the decode kernel does with its part of a sequence's keys and values: three ways through them.

``attend_at_once`` is for few keys, which are there before this step's queries are; ``attend_apart`` gives each warp keys
of its own, where its registers hold all rows; ``attend_together`` shares each tile among all warps. Each returns weighted
values [ROWS, COLUMNS], the weights' sum and the largest score [ROWS], base 2.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from ds_fp6.triton_ops.rotary import rotated

#: Scores of what is not visible: finite, so that a row that sees nothing of a tile stays a number until one that it
#: sees outweighs it.
_HIDDEN = tl.constexpr(-1.0e30)


@triton.jit
def prefetch(
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
def attend_together(
    query, new_score, new_value, is_last, cache, blocks, block, begin, end, first, seen, offset, value_offset,
    block_stride, token_stride, scale,
    HEAD: tl.constexpr, PAGE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, COLUMNS: tl.constexpr,
    WINDOWED: tl.constexpr,
):  # fmt: skip
    """Tiles ``begin`` up to ``end`` of keys, each by all warps; the last program's new key has a weight of 1 at first."""
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
def attend_apart(
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
def take_new(
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
def attend_at_once(
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
    query, new_score, new_value = take_new(
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
