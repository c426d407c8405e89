"""The sizes that batches are filled up to, so that few steps have to be captured, and the filling.

What fills a batch up are sequences with first tokens, or with none, whose cache blocks are all one that no sequence can
have. Nobody reads their logits, and rows do not depend on one another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

#: Sequences of one token each. Batches of up to 8 are filled up to a power of two: kernels take 8 tokens in the time of
#: one.
_SMALL_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64)

#: Tokens of batches with prompts: the linear layers' tiles, which take as long for fewer. Then multiples of 96 and 128.
_TOKENS = (16, 32, 48, 64, 96, 128, 192, 256, 288, 384, 480, 512)


class Size(NamedTuple):
    """Of a batch that has been filled up."""

    sequences: int
    tokens: int


def sizes(limit: int) -> tuple[int, ...]:
    """Sequences that decode batches are filled up to, the last ``limit``: at most half a batch of 64 is filling."""
    found = [size for size in _SMALL_SIZES if size < limit]
    size = 96
    while size < limit:
        found.append(size)
        size += 32 if size < 256 else 64
    return (*found, limit)


def prompt_sizes(limit: int) -> tuple[int, ...]:
    """Sequences that batches with prompts are filled up to: powers of two, and ``limit``."""
    return (*(1 << i for i in range((limit - 1).bit_length())), limit)


def token_sizes(limit: int) -> tuple[int, ...]:
    """Tokens that batches with prompts are filled up to, the last ``limit``."""
    multiples = {m for step in (96, 128) for m in range(576 // step * step, limit, step)}
    return (*sorted({t for t in (*_TOKENS, *multiples) if t < limit}), limit)


class Filler:
    """Fills up the batches of an engine that takes up to ``sequences`` and ``tokens`` in one.

    Args:
        scratch: address of an int32 list of ``scratch_entries`` times the number of a cache block that nobody reads.
        longest: tokens of a sequence that the model has positions for.
    """

    def __init__(self, sequences: int, tokens: int, scratch: int, longest: int) -> None:
        self._scratch, self._longest = scratch, longest
        self._decode, self._prompt = sizes(min(sequences, tokens)), prompt_sizes(sequences)
        self._tokens = token_sizes(tokens)

    def size(self, counts: Sequence[int]) -> Size | None:
        """What a batch of sequences with so many new tokens each is to be filled up to, None for as it is."""
        real, tokens = len(counts), sum(counts)
        if tokens == real:
            filled = next((size for size in self._decode if size >= real), None)
            return filled and Size(filled, filled)
        wanted = next(size for size in self._tokens if size >= tokens)
        if wanted - tokens > self._longest:
            return None
        # Tokens that fill need a sequence.
        filled = next((size for size in self._prompt if size >= real + (wanted > tokens)), None)
        return filled and Size(filled, wanted)

    def fill(self, batch, size: Size) -> None:
        """Adds the sequences that a ``RaggedBatchWrapper`` lacks, before it is sent to the device. Where all have one
        token, so do these; else the last one has all that are missing.
        """
        real, tokens = batch._current_sequences, batch._current_tokens
        missing, lacking = size.sequences - real, size.tokens - tokens
        if tokens == real:
            counts = [1] * missing
        else:
            counts = [0] * (missing - 1) + [lacking] if missing else []
        first = tokens
        for i, count in enumerate(counts):
            batch._inflight_seq_descriptors_shadow_buf += [first, count, 0, 0]
            batch._token_to_seq_storage_shadow_buf += [real + i] * count
            batch._kv_blocks_ptr_buf.append(self._scratch)
            first += count
        if lacking:
            batch._batch_tokens.append(torch.zeros(lacking, dtype=torch.int64))
        batch._current_sequences, batch._current_tokens = size


def scratch_entries(tokens: int, block_size: int) -> int:
    """Cache blocks of a sequence that fills a batch of up to ``tokens``."""
    return -(-tokens // block_size)
