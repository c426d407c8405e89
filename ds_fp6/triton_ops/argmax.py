"""The index of the largest value of each row, in one launch: a row is spread over programs, the last of which tells it.

A value and its index are one number of 63 bits, the value's bits in an order of their own above the index reversed: the
largest number is the largest value at its lowest index. Programs of a row meet in an atomic maximum, so that the order
in which they come changes nothing.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ds_fp6.triton_ops import overlap

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

#: Values that a program reads at a time: two loads of 16 bytes a thread in 16 bits.
TILE = 2048
WARPS = 4

#: Programs of a launch, about four for each multiprocessor of the largest GPUs: enough reads under way in wide batches.
PROGRAMS = 512

#: Programs that a row may have, at most: they wait for one another at one address.
MAX_SPLITS = 64

#: Values of a row, at most: indices of 32 bits do not overflow.
MOST_VALUES = 2**30

_INDEX_BITS = tl.constexpr(31)
_LAST_INDEX = tl.constexpr(2**31 - 1)
_SIGN = tl.constexpr(2**31)


@triton.jit
def _key(value, column):
    """[TILE] fp32 and int32 → int64, from 1 up: NaN above infinity, both zeros alike."""
    bits = value.to(tl.int32, bitcast=True)
    bits = tl.where(value == 0, 0, bits)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    ordered = tl.where(value != value, 0x7FFFFFFF, ordered)
    return ((ordered.to(tl.int64) + _SIGN) << _INDEX_BITS) | (column ^ _LAST_INDEX).to(tl.int64)


@triton.jit(do_not_specialize=["tiles_each"])
def _argmax_kernel(
    out,  # int64 [rows]
    logits,  # [rows, vocabulary]
    keys,  # int64 [rows]: the largest number so far; zero before and after
    counters,  # int32 [rows]: programs that have finished; zero before and after
    vocabulary, row_stride,
    tiles_each,  # tiles of a program; each program has part of a tile at least
    TILE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        gdc_launch_dependents()
    row, splits = tl.program_id(0), tl.num_programs(1)
    begin = tl.program_id(1) * tiles_each * TILE
    end = tl.minimum(begin + tiles_each * TILE, vocabulary)
    at = logits + row.to(tl.int64) * row_stride
    if OVERLAP:
        gdc_wait()
    # Each lane keeps the first of its largest values. What lies beyond the row is minus infinity at higher indices.
    best_column = begin + tl.arange(0, TILE)
    best = tl.load(at + best_column, mask=best_column < vocabulary, other=float("-inf")).to(tl.float32)
    for start in range(begin + TILE, end, TILE):
        column = start + tl.arange(0, TILE)
        value = tl.load(at + column, mask=column < vocabulary, other=float("-inf")).to(tl.float32)
        better = (value > best) | ((value != value) & (best == best))
        best = tl.where(better, value, best)
        best_column = tl.where(better, column, best_column)
    key = tl.max(_key(best, best_column), 0)
    if splits > 1:
        tl.atomic_max(keys + row, key, sem="relaxed", scope="gpu")
        # The maximum comes before the count, whichever threads make them.
        tl.debug_barrier()
        finished = tl.atomic_add(counters + row, 1, sem="acq_rel", scope="gpu")
        if finished == splits - 1:
            key = tl.atomic_xchg(keys + row, 0, sem="relaxed", scope="gpu")
            tl.store(counters + row, 0)
            tl.store(out + row, (key & _LAST_INDEX) ^ _LAST_INDEX)
    else:
        tl.store(out + row, (key & _LAST_INDEX) ^ _LAST_INDEX)


class ArgmaxWorkspace:
    """Where the programs of a row meet: for all batches whose rows are spread, zero between launches.

    Launches that share a workspace must follow one another on a stream.
    """

    def __init__(self, device: torch.device | str, rows: int = PROGRAMS // 2) -> None:
        self.keys = torch.zeros((rows,), dtype=torch.int64, device=device)
        self.counters = torch.zeros((rows,), dtype=torch.int32, device=device)


@functools.cache
def _kept_workspace(device: torch.device, stream: int) -> ArgmaxWorkspace:
    return ArgmaxWorkspace(device)


def _own_workspace(device: torch.device) -> ArgmaxWorkspace:
    """The current stream's on ``device``. A stream that is being captured gets one that its graph itself zeroes."""
    if device.type != "cuda":
        return _kept_workspace(device, 0)
    if torch.cuda.is_current_stream_capturing():
        return ArgmaxWorkspace(device)
    return _kept_workspace(device, torch.cuda.current_stream(device).cuda_stream)


def tiles_each(rows: int, vocabulary: int, splits: int | None = None) -> int:
    """Tiles that a program gets of one of ``rows``; ``splits``: programs of a row at most, None for the plan's."""
    tiles = triton.cdiv(vocabulary, TILE)
    if splits is None:
        splits = min(MAX_SPLITS, PROGRAMS // rows)
    return triton.cdiv(tiles, max(1, splits))


def argmax(
    logits: torch.Tensor, workspace: ArgmaxWorkspace | None = None, splits: int | None = None
) -> torch.Tensor:  # fmt: skip
    """The lowest index of each row's largest value, int64 [rows]: what ``logits.argmax(dim=-1)`` gives.

    As in torch, NaN is larger than any number and equal to any NaN, and -0 is equal to 0. Does not wait for the device.

    Args:
        logits: [rows, vocabulary], fp16, bf16 or fp32. The values of a row are adjacent; rows may be strided.
        workspace: None for one that is kept for the current stream. A CUDA graph that captures the launch should be
            given one of its own, made before: otherwise it zeroes one whenever it runs.
        splits: programs of a row, at most; overrides the plan's.

    Raises ``ValueError`` for logits of another kind, and for a workspace that has no room for the rows.
    """
    if logits.dim() != 2 or logits.dtype not in DTYPES:
        found = f"{logits.dtype} {list(logits.shape)}"
        raise ValueError(f"logits must be fp16, bf16 or fp32 [rows, vocabulary], got {found}")
    rows, vocabulary = logits.shape
    if not 0 < vocabulary <= MOST_VALUES:
        raise ValueError(f"a row must have 1 to {MOST_VALUES} values, got {vocabulary}")
    if vocabulary > 1 and logits.stride(1) != 1:
        raise ValueError(f"the values of a row must be adjacent, got strides {logits.stride()}")
    if splits is not None and splits < 1:
        raise ValueError(f"a row must have a program, got splits = {splits}")
    out = torch.empty((rows,), dtype=torch.int64, device=logits.device)
    if rows == 0:
        return out
    each = tiles_each(rows, vocabulary, splits)
    programs = triton.cdiv(triton.cdiv(vocabulary, TILE), each)
    workspace = workspace or _own_workspace(logits.device)
    if programs > 1 and rows > len(workspace.keys):
        raise ValueError(f"the workspace has room for {len(workspace.keys)} rows, got {rows}")
    overlapped = overlap.supported(logits.device)
    _argmax_kernel[(rows, programs)](
        out, logits, workspace.keys, workspace.counters, vocabulary, logits.stride(0), each,
        TILE=TILE, OVERLAP=overlapped, num_warps=WARPS, launch_pdl=overlapped,
    )  # fmt: skip
    return out
