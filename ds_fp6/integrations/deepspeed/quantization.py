"""Quantization modes in DeepSpeed's engine: checked before anything is read, and given to our linear module."""

from __future__ import annotations

import functools
import os
from contextvars import ContextVar

import torch

from ds_fp6.formats import Mode
from ds_fp6.integrations.deepspeed import models, pointwise, refusals
from ds_fp6.integrations.deepspeed.accelerator import on_cpu
from ds_fp6.integrations.deepspeed.world import stand_alone
from ds_fp6.integrations.patching import Hook, wrap


def mode_problem(mode: Mode, device: str, capability: tuple[int, int] | None = None) -> str | None:
    """Why ``device`` ("cpu" or "cuda") cannot run ``mode``, None where it can.

    ``capability`` is a GPU's compute capability; None asks torch for device 0's.
    """
    if device == "cpu":
        return None
    if device != "cuda":
        return f"there are kernels for CPUs and NVIDIA GPUs only, not for {device}"
    if mode.activation == "float32":
        return "fp32 activations run on a CPU only"
    if torch.version.hip is not None:
        return "there are kernels for CPUs and NVIDIA GPUs only, not for ROCm"
    capability = capability or torch.cuda.get_device_capability()
    if capability < (8, 0):
        return f"the GPU has compute capability {capability[0]}.{capability[1]}, at least 8.0 is needed"
    return None


def checked_mode(text: str | None) -> Mode | None:
    """The mode that ``text`` names, None for None.

    Raises ``ValueError`` with the grammar for an unknown mode, with the reason for one that this device cannot run.
    """
    if text is None:
        return None
    mode = Mode.parse(text)
    from deepspeed.accelerator import get_accelerator

    problem = mode_problem(mode, get_accelerator().device_name())
    if problem:
        raise ValueError(f"quantization mode {text!r} cannot run here: {problem}")
    return mode


def _build_hf_engine(original, path, engine_config, *args, **kwargs):
    mode = engine_config.quantization.quantization_mode
    checked_mode(mode)
    if not os.path.exists(os.path.join(path, "ds_model_config.pkl")):
        from transformers import AutoConfig

        from ds_fp6.integrations.checkpoint.location import check_location

        check_location(path)
        config = AutoConfig.from_pretrained(path)
        refusals.check(config, on_cpu(), engine_config.tensor_parallel.tp_size)
        models.activation_dtype(config, mode)
    with stand_alone(engine_config.tensor_parallel.tp_size):
        return original(path, engine_config, *args, **kwargs)


def _wrap_engine_factory() -> None:
    from deepspeed.inference.v2 import engine_factory

    wrap(engine_factory, "build_hf_engine", _build_hf_engine)


#: Whether the layer that is being built stays in 16 bits whatever the mode.
_keep_dense: ContextVar[bool] = ContextVar("keep_dense", default=False)


def _shared_expert_gate(original, self) -> None:
    """qwen2-moe's gate of one output. Its weight is loaded as a gate's, which no mode quantizes."""
    token = _keep_dense.set(True)
    try:
        original(self)
    finally:
        _keep_dense.reset(token)


def _instantiate_linear(original, linear_config, engine_config):
    mode = checked_mode(engine_config.quantization.quantization_mode)
    if _keep_dense.get():
        dense = engine_config.model_copy(update={"quantization": type(engine_config.quantization)()})
        return original(linear_config, dense)
    if mode is None:
        return original(linear_config, engine_config)
    from deepspeed.inference.v2.modules.interfaces import DSLinearRegistry
    from deepspeed.inference.v2.modules.module_registry import ConfigBundle

    from ds_fp6.modules.linear import QuantizedLinear

    # Without Triton's kernels there are still this package's own.
    fuses_gates = os.environ.get(pointwise.VARIABLE, "").strip() != "upstream"
    implementation = {"mode": mode, "fuses_gates": fuses_gates}
    bundle = ConfigBundle(name=QuantizedLinear.name(), config=linear_config, implementation_config=implementation)
    return DSLinearRegistry.instantiate_config(bundle)


def _row_parallel(layer_name: str):
    """A wrapper of the method that shards and transforms a weight split over its inputs.

    Quantized with one scale per output channel, each rank takes the scale of the whole row, so that tensor
    parallelism changes no code. Groups of inputs that lie within a rank's part have their own scales anyway.
    """

    def transform(original, self, param):
        from ds_fp6.modules.linear import QuantizedLinear
        from ds_fp6.quantize import compute_scales

        layer = getattr(self, layer_name)
        split = self.tp_size > 1 and param.dim() == 2 and isinstance(layer, QuantizedLinear)
        if not split or layer.mode.group_size:
            return original(self, param)
        largest = torch.maximum(param.amax(dim=1, keepdim=True), -param.amin(dim=1, keepdim=True))
        layer.row_scales = compute_scales(largest, layer.mode.format)
        try:
            return original(self, param)
        finally:
            layer.row_scales = None

    return transform


def _wrap_row_parallel() -> None:
    from deepspeed.inference.v2.model_implementations.inference_transformer_base import DSTransformerModelBase

    wrap(DSTransformerModelBase, "transform_attn_out_param", _row_parallel("attn_out"))
    wrap(DSTransformerModelBase, "transform_mlp_2_param", _row_parallel("mlp_2"))


@functools.cache
def _say_experts_stay(mode: str, dtype: str) -> None:
    from deepspeed.utils import logger

    logger.warning(f"ds_fp6: quantization mode {mode} leaves the experts of this model in {dtype}")


def _instantiate_moe(original, moe_config, engine_config):
    mode = engine_config.quantization.quantization_mode
    if mode is not None:
        _say_experts_stay(mode, str(moe_config.input_dtype))
    return original(moe_config, engine_config)


def _wrap_heuristics() -> None:
    from deepspeed.inference.v2.model_implementations.qwen_v2_moe.model import Qwen2MoeInferenceModel
    from deepspeed.inference.v2.modules import heuristics

    wrap(heuristics, "instantiate_linear", _instantiate_linear)
    wrap(heuristics, "instantiate_moe", _instantiate_moe)
    wrap(Qwen2MoeInferenceModel, "make_shared_expert_gate_layer", _shared_expert_gate)


HOOKS = (
    Hook("deepspeed.inference.v2.modules.heuristics", "quantization modes reach our linear module", _wrap_heuristics),
    Hook("DSTransformerModelBase.transform_{attn_out,mlp_2}_param", "full rows' scales", _wrap_row_parallel),
    Hook("deepspeed.inference.v2.build_hf_engine", "modes and configs are checked first", _wrap_engine_factory),
)
