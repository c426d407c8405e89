"""The ragged batch's way to the device: one copy a step, from host buffers that are not written while it is under way.

DeepSpeed has one pinned buffer for each of five tensors and copies them without waiting. Two calls of ``put`` with
nothing read between them then write the second batch over the first one's, which the device may not have read yet:
wrong lengths and cache blocks, and illegal accesses. Here two sets of buffers take turns, so that the host prepares a
step while the device works on the one before; it waits only where it would get two steps ahead.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

import torch

from ds_fp6.integrations.patching import Hook, wrap

#: The batch's tensors, by DeepSpeed's attribute names; each has a shadow on the host.
FIELDS = (
    "_batch_metadata_storage", "_inflight_seq_descriptors", "_kv_ptrs", "_token_to_seq_storage", "_input_ids",
)  # fmt: skip
_ALIGNMENT = 16
_SETS = 2


def device_mark():
    """An event after all that the device has been asked to do, None where it is done already."""
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().Event is None:
        return None
    event = get_accelerator().Event()
    event.record()
    return event


class Staging:
    """A batch's tensors in one buffer on the device, and sets of host buffers that are copied to it by turns."""

    def __init__(self, batch) -> None:
        tensors = {name: getattr(batch, name) for name in FIELDS}
        offsets, size = {}, 0
        for name, tensor in tensors.items():
            offsets[name] = size
            size += math.ceil(tensor.nbytes / _ALIGNMENT) * _ALIGNMENT
        device = tensors[FIELDS[0]].device
        self._device = torch.zeros(size, dtype=torch.uint8, device=device)
        pinned = device.type != "cpu"
        self._hosts = [torch.zeros(size, dtype=torch.uint8, pin_memory=pinned) for _ in range(_SETS)]
        #: Set where a set's last copy may still be under way.
        self._copied: list = [None] * _SETS
        self._current = 0

        def views(buffer: torch.Tensor) -> dict[str, torch.Tensor]:
            return {
                name: buffer[offsets[name] : offsets[name] + t.nbytes].view(t.dtype).view(t.shape)
                for name, t in tensors.items()
            }

        self._views = [views(host) for host in self._hosts]
        for name, tensor in views(self._device).items():
            setattr(batch, name, tensor)
        self._show(batch)

    def _show(self, batch) -> None:
        for name, tensor in self._views[self._current].items():
            setattr(batch, f"{name}_shadow", tensor)

    def turn(self, batch) -> None:
        """Gives the batch the other set of host buffers, once the device has read them."""
        self._current = (self._current + 1) % _SETS
        copied = self._copied[self._current]
        if copied is not None:
            copied.synchronize()
            self._copied[self._current] = None
        self._show(batch)

    def send(self) -> None:
        """Copies the current set to the device, without waiting."""
        self._device.copy_(self._hosts[self._current], non_blocking=True)
        self._copied[self._current] = device_mark()


def _init(original, self, config) -> None:
    original(self, config)
    self._staging = Staging(self)
    #: What fills a batch of one token a sequence up to a size that is captured, if anything does.
    self._padder = None
    #: Tokens that are on the device only, and their places.
    self._fed = None


def _clear(original, self) -> None:
    original(self)
    self._staging.turn(self)


def _finalize(original, self, padding=False) -> None:
    """``RaggedBatchWrapper.finalize`` with one copy to the device."""
    from deepspeed.inference.v2.ragged.ragged_wrapper import to_padded

    if self._padder is not None:
        self._padder.pad(self)
    tokens, sequences = self._current_tokens, self._current_sequences
    int32 = torch.int32
    self._batch_metadata_storage_shadow.copy_(torch.tensor([tokens, sequences], dtype=int32))
    descriptors = torch.tensor(self._inflight_seq_descriptors_shadow_buf, dtype=int32)
    self._inflight_seq_descriptors_shadow[:sequences].copy_(descriptors.view(-1, 4))
    self._kv_ptrs_shadow[:sequences].copy_(torch.tensor(self._kv_blocks_ptr_buf, dtype=torch.int64))
    self._token_to_seq_storage_shadow[:tokens].copy_(
        torch.tensor(self._token_to_seq_storage_shadow_buf, dtype=int32)
    )  # fmt: skip
    if self._batch_tokens:
        torch.cat(self._batch_tokens, out=self._input_ids_shadow[:tokens])
    if padding:
        padded = to_padded(tokens)
        self._input_ids_shadow[tokens:padded].fill_(-1)
        self._token_to_seq_storage_shadow[tokens:padded].fill_(-1)
    self._is_padded = bool(padding)
    self._staging.send()
    if self._fed is not None:
        places, values = self._fed
        self._input_ids[places] = values


@contextlib.contextmanager
def fed(engine, feed: tuple[torch.Tensor | slice, torch.Tensor] | None) -> Iterator[None]:
    """Within it, ``engine.put`` takes some tokens from the device instead of those that it is given.

    ``feed``: the places of these tokens among all of the batch, and the tokens int64, both on the device; None for
    no such tokens.
    """
    engine._batch._fed = feed
    try:
        yield
    finally:
        engine._batch._fed = None


def to_device(values: Sequence, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A tensor of ``values`` that is copied to ``device`` without waiting for what the device is doing."""
    tensor = torch.tensor(values, dtype=dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _extend_kv_cache(original, self, new_ids, cache_group=0) -> None:
    """Copies new block numbers to the device from memory of their own.

    DeepSpeed copies them from the sequence's slot of a pinned buffer, which the next sequence in that slot overwrites.
    """
    groups = [new_ids] if isinstance(new_ids, torch.Tensor) else list(new_ids)
    if len(groups) != self._num_allocation_groups[cache_group]:
        raise ValueError(
            f"block numbers of {len(groups)} allocation groups, expected {self._num_allocation_groups[cache_group]}"
        )
    for group, ids in enumerate(groups):
        if ids.numel() == 0:
            continue
        first = int(self._blocks_per_allocation_group[cache_group][group])
        last = first + ids.numel()
        ids = ids.to(dtype=torch.int32, device="cpu")
        self._kv_cache_ids_shadow[cache_group][group][first:last].copy_(ids)
        # Not pinned, so CUDA takes a copy of it before it returns.
        self._kv_cache_ids[cache_group][group][first:last].copy_(ids, non_blocking=True)
        self._blocks_per_allocation_group[cache_group][group] = last


def _all_block_ids(original, self, cache_group=0) -> torch.Tensor:
    """The sequence's blocks, from the host: DeepSpeed's come from the device, and freeing them waits for it at each."""
    ids, counts = self._kv_cache_ids_shadow[cache_group], self._blocks_per_allocation_group[cache_group]
    return torch.cat([group[: int(count)] for group, count in zip(ids, counts, strict=True)])


def _build_atoms(original, self, ragged_batch) -> None:
    """DeepSpeed's own attention has one more pinned buffer."""
    copied = self.__dict__.pop("_atoms_copied", None)
    if copied is not None:
        copied.synchronize()
    original(self, ragged_batch)
    self.__dict__["_atoms_copied"] = device_mark()


def _put(original, self, batch_uids, batch_tokens, do_checks=True):
    """Logits of the caller's own: the model's are overwritten by the next step."""
    return original(self, batch_uids, batch_tokens, do_checks=do_checks).clone()


def _wrap_batch() -> None:
    from deepspeed.inference.v2.engine_v2 import InferenceEngineV2
    from deepspeed.inference.v2.modules.implementations.attention.dense_blocked_attention import (
        DSDenseBlockedAttention,
    )
    from deepspeed.inference.v2.ragged import DSSequenceDescriptor, RaggedBatchWrapper

    wrap(RaggedBatchWrapper, "__init__", _init)
    wrap(RaggedBatchWrapper, "clear", _clear)
    wrap(RaggedBatchWrapper, "finalize", _finalize)
    wrap(DSSequenceDescriptor, "extend_kv_cache", _extend_kv_cache)
    wrap(DSSequenceDescriptor, "all_block_ids", _all_block_ids)
    wrap(DSDenseBlockedAttention, "build_atoms", _build_atoms)
    wrap(InferenceEngineV2, "put", _put)


HOOKS = (
    Hook("deepspeed.inference.v2.ragged.RaggedBatchWrapper", "overwrote buffers and logits in use", _wrap_batch),
)
