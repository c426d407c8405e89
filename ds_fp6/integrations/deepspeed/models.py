"""The engine's model classes: what of a checkpoint's config they would ignore or get wrong."""

from __future__ import annotations

import functools
import math

import torch

from ds_fp6.formats import Mode
from ds_fp6.integrations.deepspeed import rotary
from ds_fp6.integrations.deepspeed.accelerator import on_cpu
from ds_fp6.integrations.patching import Hook, subclasses, wrap

#: Names under which the families keep their norms' epsilon; OPT has none and uses torch's default.
EPSILON_NAMES = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "layernorm_epsilon")

#: transformers' names of activations computed with the error function rather than its tanh approximation.
EXACT_GELU = ("gelu", "gelu_python")


def _models() -> list[type]:
    from deepspeed.inference.v2.model_implementations.inference_transformer_base import DSTransformerModelBase

    return subclasses(DSTransformerModelBase)


def _replace_property(name: str, make) -> None:
    """Replaces each model class's own property ``name`` by ``make(its getter)``."""
    for cls in _models():
        own = cls.__dict__.get(name)
        if isinstance(own, property) and not getattr(own.fget, "__isabstractmethod__", False):
            setattr(cls, name, property(make(own.fget)))


def checkpoint_dtype(config) -> torch.dtype:
    """The dtype that a config names, fp32 where it names none."""
    dtype = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None) or torch.float32
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def activation_dtype(config, quantization_mode: str | None) -> torch.dtype:
    """The dtype in which a model runs: the quantization mode's activations, else the checkpoint's dtype.

    Raises ``ValueError`` where the mode takes the checkpoint's 16-bit type and the checkpoint has none.
    """
    own = checkpoint_dtype(config)
    if quantization_mode is None:
        return own
    mode = Mode.parse(quantization_mode)
    if mode.activation is not None:
        return getattr(torch, mode.activation)
    if own not in (torch.float16, torch.bfloat16):
        raise ValueError(
            f"quantization mode {quantization_mode!r} runs in the checkpoint's 16-bit type, but the checkpoint is in "
            f"{own}; name the type: af16, abf16 or a32"
        )
    return own


def _activation_dtype(upstream):
    from deepspeed.inference.v2.inference_utils import DtypeEnum

    def activation_dtype_property(self):
        dtype = activation_dtype(self._config, self._engine_config.quantization.quantization_mode)
        if dtype in (torch.float16, torch.bfloat16) or on_cpu():
            return DtypeEnum(dtype)
        return upstream(self)

    return activation_dtype_property


def _head_size(upstream):
    return lambda self: getattr(self._config, "head_dim", None) or upstream(self)


def _replace_properties() -> None:
    _replace_property("activation_dtype", _activation_dtype)
    _replace_property("head_size", _head_size)
    _replace_property("rope_theta", rotary.rope_theta)
    _replace_property("positional_embedding_config", rotary.positional_embedding_config)


def _shard_endpoints(original, dim_size, shard_rank, num_shards, granularity=32):
    """Widths that are no multiple of the granularity are split at the largest granule that divides them."""
    return original(dim_size, shard_rank, num_shards, math.gcd(dim_size, granularity))


def _attention_width(original, _model_width, shard_rank, num_shards, head_size, n_heads_q=None, n_heads_kv=None):
    """The heads' own width instead of the model's, which differs where a config names ``head_dim``."""
    width = head_size * n_heads_q if n_heads_q is not None else _model_width
    return original(width, shard_rank, num_shards, head_size, n_heads_q, n_heads_kv)


def _shard_attn_out(original, param, shard_rank, num_shards, head_size, n_heads_q=None, n_heads_kv=None):
    """Input columns of the attention output, whose rows need not be as many as the heads are wide."""
    if param.dim() == 1 or n_heads_kv is None or n_heads_q == n_heads_kv or n_heads_kv % num_shards == 0:
        return original(param, shard_rank, num_shards, head_size)
    if num_shards % n_heads_kv:
        raise ValueError(f"{n_heads_kv} key/value heads cannot be split over {num_shards} ranks")
    ranks_per_head = num_shards // n_heads_kv
    width = n_heads_q // n_heads_kv * head_size
    head = shard_rank // ranks_per_head
    columns = param[:, head * width : (head + 1) * width]
    return original(columns, shard_rank % ranks_per_head, ranks_per_head, head_size)


def _wrap_sharding() -> None:
    from deepspeed.inference.v2.model_implementations.sharding import attn_out, qkv, utils

    wrap(utils, "get_shard_endpoints", _shard_endpoints)
    wrap(qkv, "qkv_out_features", _attention_width)
    wrap(attn_out, "attn_out_in_features", _attention_width)
    wrap(attn_out, "shard_attn_out_param", _shard_attn_out)


def norm_epsilon(config) -> float:
    """The epsilon of a config's norms; torch's own default, 1e-5, where it has none."""
    for name in EPSILON_NAMES:
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    return 1e-5


def _repair_norms(model) -> None:
    kernels = [getattr(model.norm, name, None) for name in ("_fp_rms", "_fp_rms_pre", "_fp_ln", "_fp_pre_ln")]
    for kernel in (*kernels, model.unembed._norm):
        if kernel is not None:
            kernel.epsilon = norm_epsilon(model.config)


def activation_name(config) -> str:
    """transformers' name of a config's MLP activation."""
    names = ("hidden_act", "activation_function", "activation")
    return next((getattr(config, name) for name in names if isinstance(getattr(config, name, None), str)), "")


def _repair_gelu(model) -> None:
    from deepspeed.inference.v2.inference_utils import ActivationType

    from ds_fp6.cpu.core_ops import ExactActivation

    if activation_name(model.config) not in EXACT_GELU:
        return
    exact = {ActivationType.GELU: ExactActivation.GELU, ActivationType.GEGLU: ExactActivation.GEGLU}
    layers = [getattr(model, name, None) for name in ("mlp_1", "shared_expert_mlp_1")]
    for layer in layers:
        for kernel in (getattr(layer, "_act_fn", None), getattr(layer, "_activation", None)):
            if getattr(kernel, "act_fn", None) in exact:
                kernel.act_fn = exact[kernel.act_fn]


def sliding_window(config) -> int | None:
    """The last positions that a query sees, None where it sees all of them."""
    window = getattr(config, "sliding_window", None)
    return window if window and getattr(config, "use_sliding_window", True) else None


def _repair_window(model) -> None:
    window = sliding_window(model.config)
    if window is None:
        return
    # Where layers differ, those that see everything either have a module of their own or would get the window too.
    every_layer = "full_attention" not in (getattr(model.config, "layer_types", None) or ())
    applies = every_layer or hasattr(model, "_global_attn")
    if applies and rotary.runs_triton(model):
        model.attn.window = window
    elif applies and on_cpu():
        kernel = model.attn._attn_kernel
        kernel.kernel = functools.partial(kernel.kernel, window=window)
    elif window < model.max_sequence_length:
        from deepspeed.utils import logger

        logger.warning(
            f"ds_fp6: {'all' if every_layer else 'some'} layers of this model were trained to attend to the last "
            f"{window} positions; here all attend to all of them, so sequences beyond {window} tokens come out "
            f"differently"
        )


def _populate(original, self) -> None:
    _repair_norms(self.model)
    _repair_window(self.model)
    if on_cpu():
        _repair_gelu(self.model)
    rotary.scale_rotary(self.model)
    original(self)


def _wrap_populate() -> None:
    from deepspeed.inference.v2.model_implementations.inference_policy_base import InferenceV2Policy

    wrap(InferenceV2Policy, "populate_model_parameters", _populate)


HOOKS = (
    Hook("*InferenceModel.{activation_dtype,head_size,rope_theta,...}", "ignored settings", _replace_properties),
    Hook("deepspeed.inference.v2.model_implementations.sharding", "refused widths, ignored head_dim", _wrap_sharding),
    Hook("InferenceV2Policy.populate_model_parameters", "epsilon, GELU, sliding window, scaled rotary", _wrap_populate),
)
