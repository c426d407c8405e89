"""Attention of many queries a sequence: causal flash attention over the blocked cache."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ds_fp6.triton_ops import overlap, plan

#: Scores of what is not visible: finite, so that a row that sees nothing of a tile stays a number until one that it
#: sees outweighs it.
_HIDDEN = tl.constexpr(-1.0e30)


@triton.jit
def _attend(
    total, weight_sum, maximum, query, cache, blocks, begin, end, last, position, limit, within, value_offset,
    block_stride, token_stride, scale, window,
    HEAD: tl.constexpr, PAGE: tl.constexpr, KEYS: tl.constexpr, COLUMNS: tl.constexpr,
    MASKED: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """Tiles ``begin`` up to ``end`` of keys, of which ``last`` is the sequence's last; MASKED: not all are visible."""
    key, column = tl.arange(0, KEYS), tl.arange(0, COLUMNS)
    # Block numbers are read a step ahead: were they part of the step, Triton would pipeline them and not the keys.
    block = tl.load(blocks + tl.minimum(begin, last) * KEYS // PAGE)
    for tile in range(begin, end):
        start = tile * KEYS
        tile_at = cache + block.to(tl.int64) * block_stride + (start % PAGE) * token_stride + within
        block = tl.load(blocks + tl.minimum(tile + 1, last) * KEYS // PAGE)
        if MASKED:
            there = (start + key < limit)[:, None] & (column < HEAD)[None, :]
            keys = tl.load(tile_at, mask=there, other=0.0)
            values = tl.load(tile_at + value_offset, mask=there, other=0.0)
        elif HEAD == COLUMNS:
            keys, values = tl.load(tile_at), tl.load(tile_at + value_offset)
        else:
            there = tl.broadcast_to((column < HEAD)[None, :], (KEYS, COLUMNS))
            keys = tl.load(tile_at, mask=there, other=0.0)
            values = tl.load(tile_at + value_offset, mask=there, other=0.0)
        score = tl.dot(query, tl.trans(keys)) * scale
        if MASKED:
            at = (start + key)[None, :]
            visible = at <= position[:, None]
            if WINDOWED:
                visible &= at > position[:, None] - window
            score = tl.where(visible, score, _HIDDEN)
        new_maximum = tl.maximum(maximum, tl.max(score, 1))
        correction = tl.exp2(maximum - new_maximum)
        weight = tl.exp2(score - new_maximum[:, None])
        weight_sum = weight_sum * correction + tl.sum(weight, 1)
        total = tl.dot(weight.to(values.dtype), values, total * correction[:, None])
        maximum = new_maximum
    return total, weight_sum, maximum


@triton.jit(do_not_specialize=["n_sequences", "window"])
def _prefill_kernel(
    out, q, cache,  # [n_tokens, q_heads · HEAD] twice, the second strided; one layer's cache
    sequences, pointers,  # the ragged batch's
    n_sequences, q_stride, out_stride, block_stride, token_stride,
    scale,  # softmax scale · log2(e)
    window,  # positions that a query sees, where WINDOWED
    GROUP: tl.constexpr, HEAD: tl.constexpr, PAGE: tl.constexpr, SEQUENCES: tl.constexpr, QUERIES: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, COLUMNS: tl.constexpr, WINDOWED: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    head, kv_heads = tl.program_id(0), tl.num_programs(0)
    # The last queries see most: they go first.
    program = tl.num_programs(1) - 1 - tl.program_id(1)

    # Sequence i has the programs from first_token // QUERIES + i on, which leaves it enough of them.
    candidate = tl.arange(0, SEQUENCES)
    firsts = tl.load(sequences + candidate * 4, mask=candidate < n_sequences, other=1 << 30)
    sequence = tl.sum((firsts // QUERIES + candidate <= program).to(tl.int32), 0) - 1
    first_token = tl.load(sequences + sequence * 4)
    queries = tl.load(sequences + sequence * 4 + 1)
    seen = tl.load(sequences + sequence * 4 + 2)
    begin_query = (program - first_token // QUERIES - sequence) * QUERIES
    # Sequences of one query are the decode kernel's.
    if (begin_query >= queries) | (queries == 1):
        return

    # Rows are the group's heads of one query, then of the next.
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    number = begin_query + row // GROUP
    real = ((row < QUERIES * GROUP) & (number < queries))[:, None] & (column < HEAD)[None, :]
    token = (first_token + number).to(tl.int64)
    of_row = (head * GROUP + row % GROUP)[:, None] * HEAD + column[None, :]
    if OVERLAP:
        gdc_wait()
    query = tl.load(q + token[:, None] * q_stride + of_row, mask=real, other=0.0)

    position = seen + number
    limit = seen + tl.minimum(begin_query + QUERIES, queries)
    tiles = tl.cdiv(limit, KEYS)
    if WINDOWED:
        first_tile = tl.maximum(seen + begin_query - window + 1, 0) // KEYS
        whole = first_tile
    else:
        first_tile = 0
        whole = (seen + begin_query + 1) // KEYS
    blocks = tl.load(pointers + sequence).to(tl.pointer_type(tl.int32))
    within = tl.arange(0, KEYS)[:, None] * token_stride + head * HEAD + column[None, :]

    maximum = tl.full((ROWS,), float("-inf"), tl.float32)
    weight_sum = tl.zeros((ROWS,), tl.float32)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    if not WINDOWED:
        total, weight_sum, maximum = _attend(
            total, weight_sum, maximum, query, cache, blocks, first_tile, whole, tiles - 1, position, limit, within,
            kv_heads * HEAD, block_stride, token_stride, scale, window,
            HEAD, PAGE, KEYS, COLUMNS, False, False,
        )  # fmt: skip
    total, weight_sum, maximum = _attend(
        total, weight_sum, maximum, query, cache, blocks, whole, tiles, tiles - 1, position, limit, within,
        kv_heads * HEAD, block_stride, token_stride, scale, window,
        HEAD, PAGE, KEYS, COLUMNS, True, WINDOWED,
    )  # fmt: skip
    result = total / weight_sum[:, None]
    if OVERLAP:
        # Not earlier: the next layer's blocks take a multiprocessor each, which programs in their loop would then lack.
        gdc_launch_dependents()
    tl.store(out + token[:, None] * out_stride + of_row, result.to(out.dtype.element_ty), mask=real)


def prefill_attention(
    out: torch.Tensor, q: torch.Tensor, cache: torch.Tensor, sequences: torch.Tensor, pointers: torch.Tensor,
    scale: float, window: int | None, most_sequences: int = 64, long: bool = False, tile: plan.Tile | None = None,
) -> None:  # fmt: skip
    """``softmax(scale · q kᵀ + causal mask) v`` for every sequence of more than one query; others' rows are left.

    Args:
        out, q: [n_tokens, q_heads · head_size], fp16 or bf16; rows may be strided. Sequences lie one after another.
        cache: one layer, [blocks, block_size, 2, kv_heads, head_size], with the queries' own keys and values in it.
        sequences, pointers: as in the package's docstring, n_seqs rows each.
        window: a query sees the last ``window`` positions up to its own; None is all of them.
        most_sequences: of any batch; launches with another one are compiled anew.
        long: whether sequences are long, by ``plan.LONG_PROMPT``.
        tile: overrides the plan's.
    """
    _, page, _, kv_heads, head_size = cache.shape
    n, group = len(sequences), q.shape[1] // (kv_heads * head_size)
    tile = tile or plan.prefill_tile(head_size, group, page, long)
    queries = tile.rows // group
    overlapped = overlap.supported(q.device)
    _prefill_kernel[(kv_heads, q.shape[0] // queries + n)](
        out, q, cache, sequences, pointers,
        n, q.stride(0), out.stride(0), cache.stride(0), cache.stride(1),
        scale * math.log2(math.e), window or 0,
        GROUP=group, HEAD=head_size, PAGE=page, SEQUENCES=plan.power_of_two(max(n, most_sequences)),
        QUERIES=queries, ROWS=tile.rows, KEYS=tile.keys, COLUMNS=plan.power_of_two(head_size), WINDOWED=bool(window),
        OVERLAP=overlapped, num_warps=tile.warps, num_stages=tile.stages, launch_pdl=overlapped,
    )  # fmt: skip
