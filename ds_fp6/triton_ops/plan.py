"""Tile sizes of the attention kernels, and over how many programs the keys of a sequence are spread."""

from __future__ import annotations

from dataclasses import dataclass

#: Rows of the smallest matrix product of tensor cores: the query heads of a key/value head are padded to it.
MIN_ROWS = 16

#: Programs that a decode launch aims at, about two for each multiprocessor of the largest GPUs.
DECODE_PROGRAMS = 256

#: Programs that a sequence and head may have, at most: adding up more partial results takes longer than they save.
MAX_SPLITS = 32

#: Keys that a program gets, to the nearest number of programs. Tried one by one on an H200: 700 keys took 10.1 µs in one
#: program, 7.4 in three and 7.3 in five; 8192 keys 20.5 in eight, 18.8 in sixteen, 19.0 in 32 and 86 in one; 4096 keys
#: of eight sequences 39 in four and 64 in one.
PROGRAM_KEYS = 256

#: Tiles of keys up to which a decode program holds all of its keys and values: 192 registers a thread.
AT_ONCE = 3

#: Keys that a decode program asks the L2 cache for before it may start: enough for the pipeline's first steps.
PREFETCHED_KEYS = 128

#: Mean positions of a batch's prompts from which on the larger tile is the faster one: on an H200 it is behind by
#: 4 % at 2048 and ahead by 5 % at 8192.
LONG_PROMPT = 4096


@dataclass(frozen=True)
class Tile:
    """A kernel's tile: query rows, keys a step, warps, and stages of the pipeline that loads keys and values.

    ``apart``: a decode step's keys are divided among the warps, each of which then needs registers for all rows.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    apart: bool = False


def power_of_two(value: int) -> int:
    """The least power of two that is not below ``value``."""
    return 1 << (value - 1).bit_length()


def decode_tile(head_size: int, group: int, block_size: int) -> Tile:
    """For one query a sequence; ``group``: query heads per key/value head. A step stays within one cache block."""
    rows = max(MIN_ROWS, power_of_two(group))
    if rows == MIN_ROWS and head_size <= 128 and block_size % 64 == 0:
        return Tile(rows, 64, warps=4, stages=4, apart=True)
    return Tile(rows, min(block_size, 64 if rows <= 32 and head_size <= 128 else 32), warps=4, stages=3)


def prefill_tile(head_size: int, group: int, block_size: int, long: bool = False) -> Tile:
    """For many queries a sequence, whose rows are (query, head of the group) pairs; ``long``: see LONG_PROMPT."""
    rows = max(64, power_of_two(group))
    if head_size > 128:
        return Tile(rows, min(block_size, 32), warps=4, stages=2)
    if head_size > 64 and long:
        return Tile(max(128, rows), min(block_size, 64), warps=8, stages=3)
    return Tile(rows, min(block_size, 32 if head_size > 64 else 64), warps=8 if rows >= 128 else 4, stages=3)


def splits(sequences: int, kv_heads: int) -> int:
    """Programs over which the keys of each sequence and head are spread, at most.

    It depends on nothing but the batch's size, so that a captured launch serves any lengths: a program finds its own
    part of the keys from the true length, and has none where there are too few. It is the same for all sizes up to a
    power of two, and so for a batch and the size that it is filled up to: sums are rounded alike.
    """
    return max(1, min(MAX_SPLITS, DECODE_PROGRAMS // (power_of_two(sequences) * kv_heads)))


def parts(members: int, columns: int, warps: int) -> int:
    """Partial results of ``members`` heads of ``columns`` channels that are read at a time: 128 registers a thread."""
    return max(1, min(8, 128 * 32 * warps // (members * columns)))


def most_partials(max_sequences: int, kv_heads: int) -> int:
    """Partial results that any batch of up to ``max_sequences`` may leave, one a program of a split launch."""
    counts = (n * kv_heads * splits(n, kv_heads) for n in range(1, max_sequences + 1) if splits(n, kv_heads) > 1)
    return max(counts, default=0)
