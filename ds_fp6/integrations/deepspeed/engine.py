"""The inference engine's own bookkeeping: scheduling checks, scratch buffers, the KV cache and its blocks."""

from __future__ import annotations

import math

import torch

from ds_fp6.integrations.deepspeed.accelerator import on_cpu
from ds_fp6.integrations.patching import Hook, replace, wrap


def _can_schedule(self, uids, lengths):
    """``InferenceEngineV2.can_schedule``, with the free blocks of each cache group as the list that they are."""
    from deepspeed.inference.v2.ragged import PlaceholderSequenceDescriptor
    from deepspeed.inference.v2.scheduling_utils import SchedulingResult

    uids, lengths, limits = list(uids), list(lengths), self._config.state_manager
    if len(uids) > limits.max_ragged_sequence_count:
        return SchedulingResult.BatchSequenceLimitExceeded
    tracked = self._state_manager.n_tracked_sequences
    free_blocks = min(self._state_manager.free_blocks)
    for uid, length in zip(uids, lengths):
        sequence = self._state_manager.get_sequence(uid)
        if sequence is None:
            tracked += 1
            sequence = PlaceholderSequenceDescriptor()
        scheduled, blocks = self._model.get_kv_requirements(sequence, length, free_blocks)
        if scheduled != length:
            return SchedulingResult.KVCacheLimitExceeded
        free_blocks -= blocks
    if tracked > limits.max_tracked_sequences:
        return SchedulingResult.EngineSequenceLimitExceeded
    if sum(lengths) > limits.max_ragged_batch_size:
        return SchedulingResult.BatchTokenLimitExceeded
    return SchedulingResult.Success


def _replace_can_schedule() -> None:
    from deepspeed.inference.v2.engine_v2 import InferenceEngineV2

    InferenceEngineV2.can_schedule = _can_schedule


def _maybe_allocate_kv(original, self, sequence, n_new_tokens: int) -> None:
    """A token that goes into a block which is partly filled, as most do, needs none: nothing is counted for it."""
    if n_new_tokens != 1 or sequence.seen_tokens % self.attn.kv_block_size == 0:
        original(self, sequence, n_new_tokens)


def _wrap_allocation() -> None:
    from deepspeed.inference.v2.model_implementations.inference_transformer_base import DSTransformerModelBase

    wrap(DSTransformerModelBase, "maybe_allocate_kv", _maybe_allocate_kv)


def empty_from(buffer: torch.Tensor, shape) -> torch.Tensor:
    """A view of ``shape`` on the start of a contiguous ``buffer``.

    DeepSpeed's own remembers every view by buffer, and so keeps the buffers of each engine for ever.
    """
    strides, size = [], 1
    for extent in reversed(shape):
        strides.append(size)
        size *= extent
    if size == 0:
        raise ValueError(f"cannot view a buffer as {list(shape)}: no elements")
    if size > buffer.numel():
        raise ValueError(f"a buffer of {list(buffer.shape)} has no room for {list(shape)}")
    return buffer.as_strided(shape, strides[::-1])


def _replace_empty_from() -> None:
    from deepspeed.inference.v2 import allocator

    allocator.Allocator.cache.clear()
    allocator.Allocator.empty_from = empty_from
    replace(allocator, "empty_from", empty_from)


def _attention_init(original, self, config, implementation_config) -> None:
    original(self, config, implementation_config)
    # A batch has at most one partly filled atom a sequence beside the full ones.
    self._max_atoms = config.max_sequences + math.ceil(config.max_tokens / self.q_block_size)
    self._atoms = torch.empty((self._max_atoms, 8), dtype=torch.int32, device=self._atoms.device)
    if on_cpu():
        self._atoms_shadow = torch.empty_like(self._atoms)
    else:
        from deepspeed.ops.op_builder import RaggedUtilsBuilder

        self._atoms_shadow = RaggedUtilsBuilder().load().allocate_fast_host_buffer(self._atoms)


def _wrap_attention() -> None:
    from deepspeed.inference.v2.modules.implementations.attention.dense_blocked_attention import (
        DSDenseBlockedAttention,
    )

    wrap(DSDenseBlockedAttention, "__init__", _attention_init)


def _kv_cache_init(original, self, configs, memory_config, mp_group=None, offload=False) -> None:
    """On a CPU, reserving "all but ``size`` bytes" becomes an explicit number of blocks within our budget."""
    import deepspeed.comm as dist
    from deepspeed.inference.v2.inference_utils import elem_size
    from deepspeed.inference.v2.ragged.manager_configs import AllocationMode, MemoryConfig

    from ds_fp6.cpu import memory

    if on_cpu() and AllocationMode(memory_config.mode) is AllocationMode.RESERVE:
        block_bytes = sum(2 * math.prod(c.cache_shape) * c.block_size * elem_size(c.cache_dtype) for c in configs)
        available = memory.available_bytes() - memory_config.size
        budget = min(memory.kv_budget(memory.available_bytes()), available)
        blocks = torch.tensor(budget // block_bytes)
        if dist.get_world_size(group=mp_group) > 1:
            dist.all_reduce(blocks, op=dist.ReduceOp.MIN, group=mp_group)
        if blocks.item() < 1:
            raise ValueError(
                f"the KV cache may take {max(budget, 0)} bytes, less than one block of {block_bytes} bytes: "
                f"{memory.available_bytes()} bytes are available, of which {memory_config.size} stay reserved "
                f"(memory_config.size) and {memory.VARIABLE} sets the cache's share"
            )
        memory_config = MemoryConfig(mode=AllocationMode.ALLOCATE, size=int(blocks))
    original(self, configs, memory_config, mp_group=mp_group, offload=offload)


def _wrap_kv_cache() -> None:
    from deepspeed.inference.v2.ragged.kv_cache import BlockedKVCache

    wrap(BlockedKVCache, "__init__", _kv_cache_init)


def _replace_allocator() -> None:
    if not on_cpu():
        return
    from deepspeed.inference.v2.ragged import blocked_allocator

    from ds_fp6.cpu.blocks import BlockAllocator

    replace(blocked_allocator, "BlockedAllocator", BlockAllocator)


HOOKS = (
    Hook("deepspeed.inference.v2.InferenceEngineV2.can_schedule", "put(do_checks=True) raised", _replace_can_schedule),
    Hook("DSTransformerModelBase.maybe_allocate_kv", "it counted blocks for each token", _wrap_allocation),
    Hook("deepspeed.inference.v2.allocator.empty_from", "kept buffers alive", _replace_empty_from),
    Hook("DSDenseBlockedAttention.__init__", "its atom buffer was too small", _wrap_attention),
    Hook("deepspeed.inference.v2.ragged.BlockedKVCache.__init__", "CPU: a cap on the KV cache", _wrap_kv_cache),
    Hook("deepspeed.inference.v2.ragged.BlockedAllocator", "CPU: pins host memory", _replace_allocator),
)
