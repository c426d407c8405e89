"""Logits of every token of a prompt, where FastGen computes those of the last one only.

The rows that are asked for pass through the model's own final norm, LM head and gathering over ranks, a few at a
time and each as if it were a sequence of one token, so they take no memory that grows with the prompt.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch

from ds_fp6.integrations.deepspeed.graphs import paused

#: Rows that pass through the LM head at a time.
ROWS_AT_A_TIME = 64


class _OneTokenSequences:
    """Stands in for a ragged batch of ``count`` sequences of one token each."""

    def __init__(self, count: int, device: torch.device) -> None:
        self.current_sequences = self.current_tokens = count
        self._batch = torch.tensor([count, count], dtype=torch.int32, device=device)
        self._sequences = torch.zeros(count, 4, dtype=torch.int32, device=device)
        self._sequences[:, 0] = torch.arange(count, dtype=torch.int32, device=device)
        self._sequences[:, 1] = 1

    def batch_metadata_buffer(self, on_device: bool = True) -> torch.Tensor:
        """int32 [2]: tokens, sequences."""
        return self._batch

    def inflight_seq_descriptors(self, on_device: bool = True) -> torch.Tensor:
        """int32 [sequences, 4]: first token, tokens, tokens seen before, 0."""
        return self._sequences


@contextlib.contextmanager
def prompt_logits(
    engine, rows: Sequence[int], read: Callable[[int, torch.Tensor], None] | None
) -> Iterator[None]:
    """Within it, the next ``engine.put`` also computes the logits of ``rows`` of its batch.

    Args:
        engine: an ``InferenceEngineV2``. Every rank must ask for the same rows.
        rows: indices into the batch's tokens, all sequences joined.
        read: is called with the index in ``rows`` of the first of some rows and their logits [n, vocabulary], which
            the next call overwrites. None to take part in the collective operations only.
    """
    model = engine.model()
    unembed = model._forward_unembed
    step = min(ROWS_AT_A_TIME, engine._config.state_manager.max_ragged_sequence_count)

    def with_rows(hidden_states, ragged_batch):
        for start in range(0, len(rows), step):
            some = torch.tensor(rows[start : start + step], device=hidden_states.device)
            logits = unembed(hidden_states.index_select(0, some), _OneTokenSequences(len(some), hidden_states.device))
            if read is not None:
                read(start, logits)
        return unembed(hidden_states, ragged_batch)

    model._forward_unembed = with_rows
    try:
        with paused(engine):
            yield
    finally:
        del model._forward_unembed
