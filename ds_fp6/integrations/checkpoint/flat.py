"""DeepSpeed's flattened model: one uint8 buffer, and a table of what lies where in it.

Only serialization needs the buffer, so it is laid out when it is asked for, on the host, and never stands beside a
model that is being loaded. Files and tables are DeepSpeed's own, plus ``ds_fp6.json``, which says how the weights are
quantized. Packed weights are stored in the canonical layout, so that what a GPU wrote loads on a CPU and vice versa; a
GPU lays them out for the model's type of activations as they are read.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.inference.v2.inference_parameter import STR_TO_DTYPE, InferenceParameter
from deepspeed.inference.v2.model_implementations.flat_model_helpers import (
    LayerMetadata,
    ModelMetadata,
    ParameterMetadata,
    TensorMetadata,
    make_metadata_filename,
    make_param_filename,
)
from deepspeed.inference.v2.model_implementations.inference_policy_base import ContainerMap
from deepspeed.inference.v2.model_implementations.layer_container_base import LayerContainer

from ds_fp6.formats import Format, Mode
from ds_fp6.integrations.checkpoint.memory import aligned, parameter_memory, view_at
from ds_fp6.pack import row_bytes, to_canonical, to_device_layout

CONFIG_FILE = "ds_model_config.pkl"
QUANTIZATION_FILE = "ds_fp6.json"

#: The auxiliary tensors of a packed weight, as ``modules.linear`` names them.
SCALES, HEADER = "scales", "header"

#: Where a parameter is absent: a bias that another tensor-parallel rank adds.
ABSENT = -1


def named_containers(
    transformer: list[LayerContainer], non_transformer: LayerContainer
) -> Iterator[tuple[str, LayerContainer]]:
    """The containers in the order of the buffer, under the names of DeepSpeed's table."""
    for i, layer in enumerate(transformer):
        yield f"transformer_layer_{i}", layer
    yield "non_transformer", non_transformer


def describe(policy_name: str, transformer: list[LayerContainer], non_transformer: LayerContainer) -> ModelMetadata:
    """The table of a loaded model. A tensor that two parameters share has one place."""
    metadata = ModelMetadata(policy=policy_name)
    places: dict[tuple[int, torch.Size], int] = {}
    end = 0

    def place(tensor: torch.Tensor, shape: tuple[int, ...], strides: tuple[int, ...]) -> TensorMetadata:
        nonlocal end
        offset = places.setdefault((tensor.data_ptr(), tensor.shape), end) if tensor.numel() else end
        if offset == end:
            end += aligned(torch.Size(shape).numel() * tensor.element_size())
        return TensorMetadata(dtype=str(tensor.dtype), shape=tuple(shape), strides=tuple(strides), offset=offset)

    for container_name, container in named_containers(transformer, non_transformer):
        layer = LayerMetadata()
        for name in container.annotation_attrs:
            parameter = getattr(container, name)
            if parameter is None:
                layer.params[name] = ParameterMetadata(core_param=TensorMetadata(offset=ABSENT))
                continue
            core, aux = parameter.as_subclass(torch.Tensor), parameter.aux_attrs
            shape, strides = core.shape, core.stride()
            if HEADER in aux:
                fmt, in_features = _packing(aux[HEADER])
                shape = (len(aux[SCALES]), row_bytes(in_features, fmt.bits))
                strides = (shape[1], 1)
            layer.params[name] = ParameterMetadata(
                core_param=place(core, shape, strides),
                aux_params={key: place(tensor, tensor.shape, tensor.stride()) for key, tensor in aux.items()},
            )
        metadata.layers[container_name] = layer
    return metadata


def _packing(header: torch.Tensor) -> tuple[Format, int]:
    """Format of the codes and K, of ``PackedWeight.header``."""
    exponent_bits, mantissa_bits, _group_size, in_features = header.tolist()
    return Format(exponent_bits, mantissa_bits), in_features


def buffer_bytes(metadata: ModelMetadata) -> int:
    """The size of the buffer that ``metadata`` describes."""
    tensors = [
        tensor
        for layer in metadata.layers.values()
        for parameter in layer.params.values()
        for tensor in (parameter.core_param, *parameter.aux_params.values())
        if tensor.offset != ABSENT
    ]
    sizes = (torch.Size(t.shape).numel() * STR_TO_DTYPE[t.dtype].itemsize + t.offset for t in tensors)
    return aligned(max(sizes, default=0))


def flatten(model: Any) -> torch.Tensor:
    """The model's parameters in one uint8 buffer on the host, as ``model.flattened_param_metadata`` says."""
    metadata: ModelMetadata = model.flattened_param_metadata
    buffer = torch.zeros(buffer_bytes(metadata), dtype=torch.uint8)

    def copy(tensor: torch.Tensor, place: TensorMetadata) -> None:
        view_at(buffer, place.offset, tensor.dtype, tensor.shape, tensor.stride()).copy_(tensor)

    for container_name, container in named_containers(model._transformer, model._non_transformer):
        for name, places in metadata.layers[container_name].params.items():
            parameter = getattr(container, name)
            if parameter is None:
                continue
            core, aux = parameter.as_subclass(torch.Tensor), parameter.aux_attrs
            if HEADER in aux:
                fmt, in_features = _packing(aux[HEADER])
                core = to_canonical(core, fmt, len(aux[SCALES]), in_features)
            copy(core, places.core_param)
            for key, tensor in aux.items():
                copy(tensor, places.aux_params[key])
    return buffer


def restore(
    container_map: ContainerMap, buffer: torch.Tensor, metadata: ModelMetadata, dtype: torch.dtype
) -> None:
    """Fills the containers from ``buffer`` on the host, parameter by parameter.

    ``dtype`` is that of the model's activations, which packed weights are laid out for.
    Raises ``ValueError`` for a buffer or a table cut short.
    """
    if buffer.dtype != torch.uint8 or buffer.dim() != 1 or buffer.numel() < buffer_bytes(metadata):
        raise ValueError(
            f"the flattened parameters are {buffer.dtype} {list(buffer.shape)}, "
            f"their metadata describes uint8 [{buffer_bytes(metadata)}]"
        )
    device = torch.device(get_accelerator().current_device())
    memory = parameter_memory(device)
    kept: dict[tuple[int, torch.Size], torch.Tensor] = {}

    def stored(place: TensorMetadata) -> torch.Tensor:
        return view_at(buffer, place.offset, STR_TO_DTYPE[place.dtype], place.shape, place.strides)

    def keep(place: TensorMetadata, tensor: torch.Tensor) -> torch.Tensor:
        key = place.offset, tensor.shape
        if key not in kept:
            kept[key] = memory.keep(tensor)
        return kept[key]

    containers = named_containers(container_map.transformer_params, container_map.non_transformer_params)
    for container_name, container in containers:
        layer = metadata.layers.get(container_name, LayerMetadata())
        for name in container.annotation_attrs:
            places = layer.params.get(name)
            if places is None:
                raise ValueError(f"the flattened model's metadata lacks parameter {name!r} of {container_name!r}")
            if places.core_param.offset == ABSENT:
                container.direct_injection(name, None)
                continue
            core = stored(places.core_param)
            aux = {key: stored(place) for key, place in places.aux_params.items()}
            if HEADER in aux:
                core = to_device_layout(core.to(device), *_packing(aux[HEADER]), dtype)
            aux = {key: keep(places.aux_params[key], tensor) for key, tensor in aux.items()}
            container.direct_injection(name, InferenceParameter.initialize(keep(places.core_param, core), **aux))


def serialize(engine: Any, save_path: str) -> None:
    """``InferenceEngineV2.serialize``: writes this rank's parameters and their table, rank 0 also the configuration.

    Files appear under their names only when they are complete, so a directory can be written over while it is used.
    """
    model, directory = engine._model, Path(save_path)
    directory.mkdir(parents=True, exist_ok=True)
    rank = model.tp_rank, model.tp_size
    metadata = json.dumps(model.flattened_param_metadata.model_dump_json())
    _replace(make_param_filename(save_path, *rank), lambda file: torch.save(flatten(model), file))
    _replace(make_metadata_filename(save_path, *rank), lambda file: file.write(metadata.encode()))
    if model.tp_rank == 0:
        _replace(directory / CONFIG_FILE, lambda file: pickle.dump(model.config, file))
        stored = json.dumps(_stored_as(model), indent=2)
        _replace(directory / QUANTIZATION_FILE, lambda file: file.write(stored.encode()))


def read(path: str, model: Any) -> tuple[torch.Tensor, ModelMetadata]:
    """This rank's buffer, mapped from its file, and table.

    Raises ``ValueError`` for damaged files, and where weights were quantized in another way or serialized with other
    activations than ``model`` has.
    """
    wanted = _stored_as(model)
    stored = _read_stored_as(path)
    if stored != wanted:
        raise ValueError(f"{path} was serialized as {stored}, this engine needs {wanted}; load the checkpoint itself")
    metadata = read_metadata(make_metadata_filename(path, model.tp_rank, model.tp_size))
    file = make_param_filename(path, model.tp_rank, model.tp_size)
    try:
        mapped = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:
        raise ValueError(f"{file} ({os.path.getsize(file)} bytes) is truncated or damaged: {error}") from error
    return mapped, metadata


def read_metadata(path: str) -> ModelMetadata:
    try:
        return ModelMetadata.model_validate_json(json.loads(Path(path).read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is not the metadata of a flattened model: {error}") from error


def check_files(path: str, ranks: int) -> None:
    """Raises ``FileNotFoundError`` unless ``path`` holds a model serialized for ``ranks`` tensor-parallel ranks."""
    files = [make(path, rank, ranks) for rank in range(ranks) for make in (make_param_filename, make_metadata_filename)]
    missing = [os.path.basename(file) for file in files if not os.path.isfile(file)]
    if missing:
        raise FileNotFoundError(
            f"{path} holds no model serialized for a tensor-parallel degree of {ranks}: it lacks {', '.join(missing)}"
        )


def _stored_as(model: Any) -> dict[str, str]:
    """What decides the bytes of a model: the codes' format and groups, and the type of everything else."""
    text = model.engine_config.quantization.quantization_mode
    dtype = str(model.activation_dtype.value).removeprefix("torch.")
    if text is None:
        return {"weights": dtype, "activations": dtype}
    mode = Mode.parse(text)
    group = f" in groups of {mode.group_size}" if mode.group_size else ""
    return {"weights": f"{mode.format}{group}", "activations": dtype}


def _read_stored_as(path: str) -> dict[str, str]:
    """What ``_stored_as`` gave when ``path`` was written."""
    file = Path(path, QUANTIZATION_FILE)
    if not file.is_file():
        raise ValueError(f"{path} lacks {QUANTIZATION_FILE}, which says how its weights are stored; serialize it anew")
    try:
        return dict(json.loads(file.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error


def _replace(path: str | Path, write: Callable[[Any], Any]) -> None:
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            write(file)
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)
