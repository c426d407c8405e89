"""Where each tensor of a checkpoint belongs in DeepSpeed's containers, and what it must look like.

A container declares parameters, a parameter the parts it is made of, and ``PARAM_MAPPING`` names each part's tensor.
A ``Slot`` is one such part. All slots are known before anything is read, so a checkpoint whose names or shapes do
not fit is refused by its headers alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from deepspeed.compat import get_annotations
from deepspeed.inference.v2.model_implementations.inference_policy_base import ContainerMap
from deepspeed.inference.v2.model_implementations.layer_container_base import LayerContainer
from deepspeed.inference.v2.model_implementations.parameter_base import ParametrizedList

WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

#: The LM head's weight in every family.
HEAD = "lm_head.weight"

#: Tables that models recompute; old checkpoints carry them.
BUFFERS = re.compile(r"rotary_emb\.inv_freq$")


@dataclass(frozen=True, eq=False)
class Slot:
    """One part of one parameter, filled by one tensor of the checkpoint.

    Attributes:
        container, parameter, part, index: ``getattr(container, parameter)`` is made of ``part``, or of its entry
            ``index`` where that is a list (experts).
        names: what the tensor may be called in a checkpoint, the usual name first; ``*`` matches anything.
        shape: what it must be, with None for a free size; None where nothing is known.
    """

    container: LayerContainer
    parameter: str
    part: str
    index: int | None
    names: tuple[str, ...]
    shape: tuple[int | None, ...] | None

    @property
    def kind(self) -> str:
        """The parameter's class in DeepSpeed, e.g. ``UnfusedQKVParameter``."""
        return get_annotations(type(self.container))[self.parameter].__name__

    def matches(self, name: str) -> bool:
        return any(re.fullmatch(re.escape(known).replace(r"\*", ".*"), name) for known in self.names)

    def check(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | str) -> None:
        """Raises ``ValueError`` for a tensor that does not fit."""
        if self.shape is not None and (
            len(shape) != len(self.shape) or any(want not in (None, got) for want, got in zip(self.shape, shape))
        ):
            expected = ", ".join("?" if size is None else str(size) for size in self.shape)
            raise ValueError(
                f"{name} must be [{expected}] by the model's configuration, the checkpoint's is {list(shape)}"
            )
        if dtype not in WEIGHT_DTYPES:
            raise ValueError(f"{name} is stored as {dtype}; weights are read from float32, float16 or bfloat16")


class SlotTable:
    """All slots of a model by the names of their tensors.

    ``tied``: the model's LM head is its embedding. DeepSpeed takes that for granted of OPT and maps the embedding to
    both; an OPT that is not tied gets its own head here.
    """

    def __init__(self, container_map: ContainerMap, model: Any, tied: bool) -> None:
        non_transformer = list(_slots(container_map.non_transformer_params, [""], model))
        if not tied:
            shared = {name for slot in non_transformer if slot.kind == "EmbeddingParameter" for name in slot.names}
            non_transformer = [
                replace(slot, names=(HEAD,)) if is_head(slot) and shared & set(slot.names) else slot
                for slot in non_transformer
            ]
        layers = [
            list(_slots(layer, [f"{prefix}.{i}." for prefix in container_map._transformer_prefixes], model))
            for i, layer in enumerate(container_map.transformer_params)
        ]
        #: The order of use: what comes before the layers, the layers, what comes after them.
        before = [slot for slot in non_transformer if slot.kind == "EmbeddingParameter"]
        after = [slot for slot in non_transformer if slot.kind != "EmbeddingParameter"]
        self.slots: list[Slot] = [*before, *(slot for layer in layers for slot in layer), *after]
        self._exact: dict[str, list[Slot]] = {}
        for slot in self.slots:
            for name in slot.names:
                self._exact.setdefault(name, []).append(slot)
        self._ignored = tuple(prefix for prefix in container_map._unmapped_prefixes if prefix not in self._exact)
        self._patterns = [slot for slot in self.slots if any("*" in name for name in slot.names)]

    def find(self, name: str) -> list[Slot] | None:
        """The slots that tensor ``name`` fills, [] for one that no slot asks for, None for one to ignore."""
        if name in self._exact:
            return self._exact[name]
        if name.startswith(self._ignored) or BUFFERS.search(name):
            return None
        return [slot for slot in self._patterns if slot.matches(name)]

    @property
    def embedding(self) -> Slot | None:
        """The token embedding."""
        return next((slot for slot in self.slots if slot.parameter == "word_emb"), None)

    @property
    def head(self) -> Slot | None:
        """The LM head's weight."""
        return next((slot for slot in self.slots if is_head(slot)), None)


def is_head(slot: Slot) -> bool:
    return slot.kind == "UnembedParameter" and not slot.names[0].endswith(".bias")


def _slots(container: LayerContainer, prefixes: list[str], model: Any) -> Iterator[Slot]:
    """The slots of a container, part by part of each parameter in the order of declaration."""
    sources: dict[str, str] = {}
    for source, targets in container.mapping_params.items():
        for target in [targets] if isinstance(targets, str) else targets:
            sources[target] = source
    for parameter in container.annotation_attrs:
        kind = get_annotations(type(container))[parameter]
        for part, annotation in get_annotations(kind).items():
            source = sources.get(f"{parameter}.{part}")
            if source is None:
                continue
            shape = _expected_shape(kind.__name__, parameter, part, source, model)
            if issubclass(annotation, ParametrizedList):
                for index in range(getattr(model, annotation.count_attr)):
                    names = tuple(prefix + source.replace("*", str(index)) for prefix in prefixes)
                    yield Slot(container, parameter, part, index, names, shape)
            else:
                yield Slot(container, parameter, part, None, tuple(prefix + source for prefix in prefixes), shape)


def _expected_shape(kind: str, parameter: str, part: str, source: str, model: Any) -> tuple[int | None, ...] | None:
    """Shape of a part by its parameter's class; a bias has the first dimension of its weight only."""
    hidden, inner, head = model.model_dim, model.intermediate_dim, model.head_size
    query, key_value = model.n_heads_q * head, model.n_heads_kv * head
    fused = (query + 2 * key_value, hidden)
    match kind:
        case "UnfusedQKVParameter":
            shape = (query if part == "q_params" else key_value, hidden)
        case "FusedQKVParameter" | "MegatronQKVParameter" | "GQAMegatronQKVParameter":
            shape = fused
        case "AttentionOutputParameter":
            shape = (hidden, query)
        case "MLP1Parameter" | "GatedMLPParameter":
            shape = (inner, hidden)
        case "FusedGatedMLPParameter":
            shape = (2 * inner, hidden)
        case "MLP2Parameter":
            shape = (hidden, inner)
        case "MoEGatingWeightParameter":
            shape = (1 if "shared" in parameter else model.n_experts, hidden)
        case "UnfusedMoEGatedMLPParameter" | "UnfusedMoEMLP1Parameter":
            shape = (_expert_width(model), hidden)
        case "UnfusedMoEMLP2Parameter":
            shape = (hidden, _expert_width(model))
        case "UnembedParameter":
            shape = (model.vocab_size, hidden)
        case "EmbeddingParameter":
            shape = (model.vocab_size if parameter == "word_emb" else None, hidden)
        case "NormParameter":
            return (head if parameter.startswith(("q_norm", "k_norm")) else hidden,)
        case _:
            return None
    return shape[:1] if source.endswith(".bias") else shape


def _expert_width(model: Any) -> int:
    return getattr(model.config, "moe_intermediate_size", None) or model.intermediate_dim
