"""From a checkpoint to a model's parameters, one tensor at a time.

The tensors of a parameter (q, k and v, or gate and up) are read one after the other. With the last of them DeepSpeed
concatenates, shards and transforms them, which quantizes and packs; the result moves to where it stays, and the
16-bit tensors are let go before the next parameter is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.inference.v2.checkpoint import HuggingFaceCheckpointEngine
from deepspeed.inference.v2.inference_parameter import InferenceParameter
from deepspeed.inference.v2.model_implementations.inference_policy_base import ContainerMap, InferenceV2Policy
from deepspeed.inference.v2.model_implementations.layer_container_base import LayerContainer
from deepspeed.inference.v2.model_implementations.parameter_base import ParameterBase
from deepspeed.inference.v2.model_implementations.sharding.utils import get_shard_endpoints

from ds_fp6.integrations.checkpoint import staging
from ds_fp6.integrations.checkpoint.files import Checkpoint, abbreviate
from ds_fp6.integrations.checkpoint.joins import FINALIZERS
from ds_fp6.integrations.checkpoint.memory import parameter_memory
from ds_fp6.integrations.checkpoint.slots import Slot, SlotTable, is_head


def load_parameters(policy: InferenceV2Policy, container_map: ContainerMap) -> None:
    """Fills the containers from the policy's checkpoint engine.

    Raises ``ValueError`` for tensors that are missing, unknown, of another shape or stored in a type that weights
    cannot have, before any is read where the engine has headers; and for weights that are not finite, by the name,
    row and column that they have in the checkpoint.
    """
    engine = policy._checkpoint_engine
    tied = bool(getattr(policy._model_config, "tie_word_embeddings", False))
    loader = _Loader(policy.model, SlotTable(container_map, policy.model, tied), tied)
    checkpoint = streamed_checkpoint(engine)
    with staging.staged(loader.device):
        if checkpoint is None:
            loader.load_in_order_of(engine.parameters())
        else:
            loader.load(checkpoint)


def streamed_checkpoint(engine: Any) -> Checkpoint | None:
    """The files behind ``engine``; None where it makes up its parameters in another way."""
    plain = getattr(type(engine), "parameters", None) is HuggingFaceCheckpointEngine.parameters
    return getattr(engine, "checkpoint", None) if plain else None


class _Loader:
    def __init__(self, model: Any, table: SlotTable, tied: bool) -> None:
        self._model = model
        self._table = table
        self._tied = tied
        self.device = torch.device(get_accelerator().current_device())
        self._memory = parameter_memory(self.device)
        self._filled: set[Slot] = set()
        #: What the parameters under way have been given so far: (container, parameter) → [(name, tensor)].
        self._parts: dict[tuple[LayerContainer, str], list[tuple[str, torch.Tensor]]] = {}
        self._embedding_name: str | None = None

    def load(self, checkpoint: Checkpoint) -> None:
        """Checks the headers, then reads parameter after parameter in the order of use."""
        sources: dict[Slot, str] = {}
        unknown = []
        for name in checkpoint:
            slots = self._table.find(name)
            if slots == []:
                unknown.append(name)
            for slot in slots or []:
                stored = checkpoint[name]
                slot.check(name, stored.shape, stored.dtype)
                sources[slot] = name
        embedding, head = self._table.embedding, self._table.head
        if self._tied and head is not None and embedding in sources:
            sources.setdefault(head, sources[embedding])
        self._refuse(unknown, [slot for slot in self._table.slots if slot not in sources])
        for slot in self._table.slots:
            self._fill(slot, sources[slot], checkpoint.read(sources[slot]))

    def load_in_order_of(self, parameters: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Takes tensors as they come."""
        unknown = []
        for name, tensor in parameters:
            slots = self._table.find(name)
            if slots == []:
                unknown.append(name)
            for slot in slots or []:
                slot.check(name, tuple(tensor.shape), tensor.dtype)
                self._fill(slot, name, tensor.detach())
        embedding, head = self._table.embedding, self._table.head
        if self._tied and head is not None and head not in self._filled and embedding in self._filled:
            loaded = getattr(embedding.container, embedding.parameter)
            self._fill(head, self._embedding_name, loaded.as_subclass(torch.Tensor))
        self._refuse(unknown, [slot for slot in self._table.slots if slot not in self._filled])

    def _refuse(self, unknown: list[str], missing: list[Slot]) -> None:
        if missing:
            absent = abbreviate(slot.names[0] for slot in missing)
            also = f"; it has tensors that the model does not use: {abbreviate(unknown)}" if unknown else ""
            raise ValueError(f"the checkpoint lacks {len(missing)} tensors of the model: {absent}{also}")
        if unknown:
            raise ValueError(
                f"the checkpoint has {len(unknown)} tensors that this model cannot use: {abbreviate(unknown)}"
            )

    def _fill(self, slot: Slot, name: str, tensor: torch.Tensor) -> None:
        container, key = slot.container, (slot.container, slot.parameter)
        pending = getattr(container, slot.parameter)
        if slot in self._filled or not isinstance(pending, ParameterBase):
            raise ValueError(f"the checkpoint gives {slot.names[0]} twice, the second time as {name}")
        self._filled.add(slot)
        parts = self._parts.setdefault(key, [])
        parts.append((name, tensor))
        # What is joined moves while it is joined.
        moved = tensor if type(pending) in FINALIZERS else staging.to(tensor, self.device)
        try:
            if slot.index is None:
                setattr(pending, slot.part, moved)
            else:
                getattr(pending, slot.part)[slot.index] = moved
        except (ValueError, TypeError, AssertionError, RuntimeError) as error:
            raise _named(error, parts) from error
        del pending, moved
        finalized = getattr(container, slot.parameter)
        if not isinstance(finalized, ParameterBase):
            del self._parts[key]
            if finalized is not None:
                setattr(container, slot.parameter, self._settle(slot, name, finalized))

    def _settle(self, slot: Slot, name: str, finalized: torch.Tensor) -> InferenceParameter:
        """Moves a finished parameter to where it stays."""
        core = finalized.as_subclass(torch.Tensor)
        if is_head(slot):
            shared = self._shared_with_embedding(name, core)
            if shared is not None:
                return InferenceParameter.initialize(shared)
        if slot is self._table.embedding:
            self._embedding_name = name
        aux = {key: self._memory.keep(tensor) for key, tensor in getattr(finalized, "_aux_attrs", {}).items()}
        return InferenceParameter.initialize(self._memory.keep(core), **aux)

    def _shared_with_embedding(self, name: str, head: torch.Tensor) -> torch.Tensor | None:
        """This rank's rows of the embedding, where the LM head equals them and so needs no memory of its own."""
        slot = self._table.embedding
        if slot is None or not (self._tied or name == self._embedding_name):
            return None
        embedding = getattr(slot.container, slot.parameter)
        if not isinstance(embedding, InferenceParameter):
            return None
        start, end = get_shard_endpoints(len(embedding), self._model.tp_rank, self._model.tp_size, granularity=1)
        rows = embedding.as_subclass(torch.Tensor)[start:end]
        if rows.shape != head.shape or rows.dtype != head.dtype:
            return None
        same = name == self._embedding_name or torch.equal(rows, head.to(rows.device))
        return rows if same else None


def _named(error: Exception, parts: list[tuple[str, torch.Tensor]]) -> Exception:
    """``error`` of a parameter's transformation, in terms of the tensors that the checkpoint holds."""
    for name, tensor in parts if isinstance(error, ValueError) else ():
        bad = (~torch.isfinite(tensor)).nonzero()
        if len(bad):
            position = tuple(bad[0].tolist())
            value = tensor[position].item()
            return ValueError(f"{name}[{', '.join(map(str, position))}] is {value}; only finite weights quantize")
    names = ", ".join(name for name, _ in parts)
    kind = ValueError if isinstance(error, AssertionError) else type(error)
    return kind(f"{names}: {error}")


def natural_order(name: str) -> list[tuple[int, str]]:
    """A sort key under which layer 2 comes before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
