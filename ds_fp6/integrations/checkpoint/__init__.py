"""How DeepSpeed-FastGen reads, keeps and serializes parameters.

What DeepSpeed 0.19.8 does, and what ``install`` puts in its place:

=================================  ===============================================================================
reads whole shards                 ``loader``: tensor by tensor, parameter by parameter, in the order of use
copies the model into one buffer   ``memory``: each parameter moves once, when it is complete; ``flat`` lays the
                                   buffer out only to serialize
ties embeddings for qwen2 only     ``loader``: for every family, and the LM head shares the embedding's memory
joins parts beside their copies    ``joins``: each part goes straight to its place
one thread feeds the GPU           ``staging``: several, through pinned buffers
asserts, hub look-ups for paths    ``location``, ``files``, ``slots``: exceptions that name path, tensor and shapes
=================================  ===============================================================================
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed.inference
import torch
from deepspeed.inference.v2 import engine_factory
from deepspeed.inference.v2.checkpoint import HuggingFaceCheckpointEngine
from deepspeed.inference.v2.engine_v2 import InferenceEngineV2
from deepspeed.inference.v2.logging import inference_logger
from deepspeed.inference.v2.model_implementations.flat_model_helpers import make_metadata_filename
from deepspeed.inference.v2.model_implementations.inference_model_base import DSInferenceModelBase
from deepspeed.inference.v2.model_implementations.inference_policy_base import POLICIES, InferenceV2Policy

from ds_fp6.integrations.checkpoint import flat, joins
from ds_fp6.integrations.checkpoint.files import Checkpoint
from ds_fp6.integrations.checkpoint.loader import load_parameters, natural_order
from ds_fp6.integrations.checkpoint.location import check_family, check_location
from ds_fp6.integrations.checkpoint.slots import HEAD

__all__ = ["check_location", "install"]

_MARK = "_ds_fp6_checkpoint"


def install() -> None:
    """Puts the functions of this package in the place of DeepSpeed's. Idempotent."""
    if hasattr(HuggingFaceCheckpointEngine, _MARK):
        return
    setattr(HuggingFaceCheckpointEngine, _MARK, True)
    HuggingFaceCheckpointEngine.__init__ = _checked_init(HuggingFaceCheckpointEngine.__init__)
    HuggingFaceCheckpointEngine._fetch_checkpoint_files = _fetch_checkpoint_files
    HuggingFaceCheckpointEngine.parameters = _parameters
    joins.install()
    InferenceV2Policy.populate_model_parameters = _populate_model_parameters
    DSInferenceModelBase.flattened_params = property(flat.flatten)
    InferenceEngineV2.serialize = flat.serialize
    for module in (engine_factory, deepspeed.inference):
        if hasattr(module, "build_engine_from_ds_checkpoint"):
            module.build_engine_from_ds_checkpoint = _build_engine_from_ds_checkpoint


def _checked_init(original: Any) -> Any:
    def __init__(self: HuggingFaceCheckpointEngine, model_name_or_path: str, *args: Any, **kwargs: Any) -> None:
        check_location(model_name_or_path)
        original(self, model_name_or_path, *args, **kwargs)

    return __init__


def _fetch_checkpoint_files(self: HuggingFaceCheckpointEngine) -> list[str]:
    """Finds or downloads the checkpoint and opens it; DeepSpeed calls it once the configuration is read."""
    check_family(self.model_config.model_type, getattr(self.model_config, "quantization_config", None))
    self._local_checkpoint_dir = _local_directory(self.model_name_or_path, self.auth_token)
    self.checkpoint = Checkpoint(self._local_checkpoint_dir)
    return [str(file) for file in self.checkpoint.files]


def _local_directory(name: str, token: str | None) -> str:
    if os.path.isdir(name):
        return name
    from huggingface_hub import HfApi, snapshot_download

    try:
        files = HfApi(token=token).list_repo_files(name)
    except Exception as unreachable:  # the hub's client raises as its HTTP library does
        try:
            return snapshot_download(name, token=token, local_files_only=True)
        except FileNotFoundError:
            raise unreachable from None
    weights = "*.safetensors" if any(file.endswith(".safetensors") for file in files) else "*.bin"
    return snapshot_download(name, allow_patterns=[weights, "*.json"], token=token)


def _parameters(self: HuggingFaceCheckpointEngine) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors, each a view of its file, layer by layer; a tied LM head that is not stored comes last."""
    for name in sorted(self.checkpoint, key=natural_order):
        yield name, self.checkpoint.read(name)
    if getattr(self.model_config, "tie_word_embeddings", False) and HEAD not in self.checkpoint:
        for name in self.checkpoint:
            if name.endswith(("embed_tokens.weight", "word_embeddings.weight", "wte.weight")):
                yield HEAD, self.checkpoint.read(name)
                return


def _populate_model_parameters(self: InferenceV2Policy) -> None:
    container_map = self.build_container_map()
    if self._checkpoint_engine is not None:
        load_parameters(self, container_map)
        metadata = flat.describe(
            type(self).__name__, container_map.transformer_params, container_map.non_transformer_params
        )
    else:
        buffer, metadata = flat.read(self._inf_checkpoint_path, self.model)
        flat.restore(container_map, buffer, metadata, self.model.activation_dtype.value)
    container_map.validate()
    self.model.set_parameters(
        transformer=container_map.transformer_params,
        non_transformer=container_map.non_transformer_params,
        flattened_param_buffer=None,
        flattened_param_metadata=metadata,
    )


def _build_engine_from_ds_checkpoint(path: str, engine_config: Any, debug_level: int = 20) -> InferenceEngineV2:
    """An engine from what ``InferenceEngineV2.serialize`` wrote to the directory ``path``."""
    inference_logger(level=debug_level)
    ranks = engine_config.tensor_parallel.tp_size
    flat.check_files(path, ranks)
    metadata = flat.read_metadata(make_metadata_filename(path, 0, ranks))
    if metadata.policy not in POLICIES:
        raise ValueError(f"{path} was serialized by an unknown policy, {metadata.policy!r}, not by {sorted(POLICIES)}")
    try:
        model_config = pickle.loads(Path(path, flat.CONFIG_FILE).read_bytes())
    except (pickle.UnpicklingError, EOFError, AttributeError, ImportError) as error:
        raise ValueError(f"{Path(path, flat.CONFIG_FILE)} is damaged: {error}") from error
    return InferenceEngineV2(POLICIES[metadata.policy](model_config, inf_checkpoint_path=path), engine_config)
