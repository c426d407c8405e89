"""Rotary embeddings: settings that the engine's model classes do not read, and variants that its kernels lack."""

from __future__ import annotations

import torch

from ds_fp6.integrations.deepspeed import attention
from ds_fp6.integrations.deepspeed.accelerator import on_cpu

#: Variants whose frequencies do not depend on how long a sequence has become.
SCALED = ("linear", "llama3", "yarn")


def rope_type(config) -> str:
    """The rotary variant that a transformers config asks for, from wherever its version keeps it."""
    for source in (getattr(config, "rope_parameters", None), getattr(config, "rope_scaling", None)):
        if isinstance(source, dict):
            found = source.get("rope_type") or source.get("type")
            if found:
                return found
    return "default"


def is_scaled(config) -> bool:
    """Whether a model has a scaled variant that it will run with here."""
    return rope_type(config) in SCALED and can_scale(on_cpu())


def can_scale(cpu: bool) -> bool:
    """Whether the kernels that are in use take frequencies: the CPU's and Triton's do, DeepSpeed's do not."""
    return cpu or attention.chosen(cpu)[0] == "triton"


def runs_triton(model) -> bool:
    """Whether a model was built with Triton's attention."""
    return type(model.attn).__name__ == "TritonAttention"


def problem(config, scaling: bool) -> str | None:
    """Why the rotary variant of a config cannot be run, None where it can. ``scaling``: as ``can_scale`` says."""
    kind = rope_type(config)
    if kind == "default":
        return None
    if kind not in SCALED:
        return f"rope_type {kind!r}; there are default, {', '.join(SCALED)}"
    if not scaling:
        return f"rope_type {kind!r}: DeepSpeed's kernels compute unscaled rotary embeddings only"
    if partial_rotary_factor(config) != 1.0 and scaled_frequencies(config)[1] != 1.0:
        return f"rope_type {kind!r} that scales attention, on a part of each head"
    return None


def partial_rotary_factor(config) -> float:
    """The part of each head that is rotated, from wherever the installed transformers keeps it."""
    rope = getattr(config, "rope_parameters", None) or {}
    return rope.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0


def scaled_frequencies(config) -> tuple[torch.Tensor, float]:
    """transformers' inverse frequencies, fp32 [rotary / 2], and the factor that it multiplies q and k with."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    frequencies, factor = ROPE_INIT_FUNCTIONS[rope_type(config)](config, device="cpu")
    return frequencies.float(), float(factor)


def rope_theta(upstream):
    """A wrapper of the model's property, which refuses scaled variants: their frequencies replace its theta."""
    return lambda self: self._config.rope_parameters["rope_theta"] if is_scaled(self._config) else upstream(self)


def positional_embedding_config(upstream):
    """A wrapper of the model's property, which reads ``rotate_dim`` for phi only and theta not for falcon."""
    from deepspeed.inference.v2.modules.configs import RotateHalfConfig

    def config(self):
        if not hasattr(self._config, "partial_rotary_factor"):
            self._config.partial_rotary_factor = partial_rotary_factor(self._config)
        rotary = upstream(self)
        if rotary is None or rotary.use_trained_freqs:
            return rotary
        rotated = int(self.head_size * partial_rotary_factor(self._config))
        return RotateHalfConfig(theta_base=self.rope_theta, rotate_dim=rotated)

    return config


def scale_rotary(model) -> None:
    """Gives a model with a scaled variant its frequencies.

    A factor on q and k is one of its square on their products, so it goes into the softmax's scale.
    """
    if not is_scaled(model.config):
        return
    frequencies, factor = scaled_frequencies(model.config)
    if runs_triton(model):
        model.attn.frequencies = frequencies.to(model.attn.frequencies.device)
        model.attn.softmax_scale *= factor**2
        return
    from ds_fp6.cpu.builders import RaggedOpsBuilder

    rotate = RaggedOpsBuilder().load().kv_trained_rotary_embeddings

    def kernel(cache, q, k, v, rotary_dim, theta, *batch) -> None:
        rotate(cache, q, k, v, frequencies, *batch)

    model.attn._kv_copy.kernel = kernel
    model.attn._softmax_scale *= factor**2
