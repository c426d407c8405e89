"""On a CPU, the engine's kernel classes without the limits of the CUDA operators that they were written around.

Their constructors refuse dtypes, head sizes, head ratios and widths that the CUDA kernels were not compiled for; the
CPU's operators take any. A constructor here only looks its operators up.
"""

from __future__ import annotations

import torch

from ds_fp6.integrations.deepspeed.accelerator import on_cpu
from ds_fp6.integrations.patching import Hook, replace

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _dtype(dtype) -> torch.dtype:
    from deepspeed.inference.v2.inference_utils import DtypeEnum

    dtype = DtypeEnum(dtype).value
    if dtype not in DTYPES:
        raise ValueError(f"activations are one of {DTYPES}, got {dtype}")
    return dtype


def _operators(builder: str):
    from ds_fp6.cpu.builders import BUILDERS

    return BUILDERS[builder]().load()


def _core() -> object:
    return _operators("InferenceCoreBuilder")


def _ragged() -> object:
    return _operators("RaggedOpsBuilder")


def _norm(self, channels, fp_dtype, epsilon=1e-5):
    _dtype(fp_dtype)
    self.inf_module, self.epsilon = _core(), epsilon


def _bias_activation(self, channels, dtype, act_fn):
    from deepspeed.inference.v2.inference_utils import ActivationType

    _dtype(dtype)
    self.kernel, self.act_fn = _core().bias_activation, ActivationType(act_fn)
    if self.act_fn not in self.supported_act_fns:
        raise ValueError(f"activation {self.act_fn!r} is none of {self.supported_act_fns}")


def _gated_activation(self, channels, fp_dtype, act_fn):
    from deepspeed.inference.v2.inference_utils import ActivationType

    _dtype(fp_dtype)
    self.kernel, self.act_fn = _core().gated_activation, ActivationType(act_fn)
    if self.act_fn not in self.supported_act_fns:
        raise ValueError(f"gated activation {self.act_fn!r} is none of {self.supported_act_fns}")


def _flash_attention(self, head_size, dtype):
    _dtype(dtype)
    self.kernel = _ragged().flash_attn_by_atoms


def _embedding(self, embed_dtype, token_dtype, embed_dim):
    _dtype(embed_dtype)
    self.kernel = _ragged().ragged_embed


def _heads(self, head_size, n_q_heads, n_kv_heads, dtype):
    _dtype(dtype)
    if n_q_heads % n_kv_heads:
        raise ValueError(f"{n_q_heads} query heads do not divide into groups of {n_kv_heads} key/value heads")
    self.head_size, self.n_q_heads, self.n_kv_heads = head_size, n_q_heads, n_kv_heads


def _rotary(self, head_size, n_q_heads, n_kv_heads, dtype, rotary_dim, theta_base):
    _heads(self, head_size, n_q_heads, n_kv_heads, dtype)
    if not 0 < rotary_dim <= head_size or rotary_dim % 2:
        raise ValueError(f"rotary dimensions must be even and lie in 2..{head_size}, got {rotary_dim}")
    self.kernel, self.rotary_dim, self.theta_base = _ragged().kv_rotary_embeddings, rotary_dim, theta_base


def _trained_rotary(self, head_size, n_q_heads, n_kv_heads, dtype):
    _heads(self, head_size, n_q_heads, n_kv_heads, dtype)
    self.kernel = _ragged().kv_trained_rotary_embeddings


def _kv_copy(self, head_size, n_q_heads, n_kv_heads, dtype):
    _heads(self, head_size, n_q_heads, n_kv_heads, dtype)
    self.kernel = _ragged().linear_kv_copy


def _logits_gather(self, model_dim, fp_dtype):
    _dtype(fp_dtype)
    self.kernel = _ragged().gather_for_logits


def _moe_gather(self, dtype, channels, normalize_scores=False):
    _dtype(dtype)
    self.kernel, self.normalize_scores = _ragged().moe_gather, normalize_scores


def _moe_scatter(self, dtype, channels):
    _dtype(dtype)
    self.kernel = _ragged().moe_scatter


def _moe_gemm(self, fp_dtype, act_fn):
    _dtype(fp_dtype)
    self.kernel, self.act_fn = _operators("InferenceCutlassBuilder").moe_gemm, act_fn


def _replace_constructors() -> None:
    if not on_cpu():
        return
    from deepspeed.inference.v2.kernels import core_ops, cutlass_ops, ragged_ops
    from deepspeed.inference.v2.kernels.core_ops.cuda_layer_norm.cuda_fp_ln_base import CUDAFPLNBase
    from deepspeed.inference.v2.kernels.core_ops.cuda_rms_norm.rms_norm_base import CUDARMSNormBase

    CUDAFPLNBase.__init__ = _norm
    CUDARMSNormBase.__init__ = _norm
    core_ops.CUDABiasActivation.__init__ = _bias_activation
    core_ops.CUDAGatedActivation.__init__ = _gated_activation
    ragged_ops.BlockedFlashAttn.__init__ = _flash_attention
    ragged_ops.RaggedEmbeddingKernel.__init__ = _embedding
    ragged_ops.BlockedRotaryEmbeddings.__init__ = _rotary
    ragged_ops.BlockedTrainedRotaryEmbeddings.__init__ = _trained_rotary
    ragged_ops.LinearBlockedKVCopy.__init__ = _kv_copy
    ragged_ops.RaggedLogitsGather.__init__ = _logits_gather
    ragged_ops.MoEGather.__init__ = _moe_gather
    ragged_ops.MoEScatter.__init__ = _moe_scatter
    cutlass_ops.MoEGEMM.__init__ = _moe_gemm


def _same_dtypes(config) -> bool:
    return config.input_dtype == config.output_dtype and _dtype(config.input_dtype) in DTYPES


def _attention_supports(config) -> bool:
    from deepspeed.inference.v2.modules.configs import MaskingType, PositionalEmbeddingType

    known = (PositionalEmbeddingType.none, PositionalEmbeddingType.rotate_half)
    return (
        _same_dtypes(config)
        and PositionalEmbeddingType(config.positional_embedding_type) in known
        and MaskingType(config.masking_type) is MaskingType.causal
    )


def _replace_supports_config() -> None:
    if not on_cpu():
        return
    from deepspeed.inference.v2.modules.implementations.attention.dense_blocked_attention import (
        DSDenseBlockedAttention,
    )
    from deepspeed.inference.v2.modules.implementations.linear.blas_fp_linear import BlasFPLinear
    from deepspeed.inference.v2.modules.implementations.moe.cutlass_multi_gemm import DSMultiGemmMoE

    DSDenseBlockedAttention.supports_config = staticmethod(_attention_supports)
    BlasFPLinear.supports_config = staticmethod(_same_dtypes)
    DSMultiGemmMoE.supports_config = staticmethod(_same_dtypes)


def _replace_block_sizes() -> None:
    if not on_cpu():
        return
    from deepspeed.inference.v2.kernels.ragged_ops.blocked_flash import blocked_flash

    from ds_fp6.cpu import attention

    replace(blocked_flash, "get_q_block_size", lambda head_size: attention.Q_BLOCK)
    replace(blocked_flash, "get_kv_block_size", attention.kv_block_size)


def _rebind_builders() -> None:
    """Engine modules that were imported before the accelerator was replaced hold its old builders by name."""
    if not on_cpu():
        return
    import sys

    from ds_fp6.cpu.builders import BUILDERS

    for name, module in list(sys.modules.items()):
        if name.startswith("deepspeed.inference.v2."):
            for builder in BUILDERS.keys() & vars(module).keys():
                setattr(module, builder, BUILDERS[builder])


HOOKS = (
    Hook("deepspeed.inference.v2.*.*Builder", "CPU: the engine's operators", _rebind_builders),
    Hook("deepspeed.inference.v2.kernels", "CPU: any dtype, head size, head ratio, width", _replace_constructors),
    Hook("deepspeed.inference.v2.modules.implementations", "CPU: fp32, any top-k", _replace_supports_config),
    Hook("get_q_block_size, get_kv_block_size", "CPU: they ask for a GPU's compute capability", _replace_block_sizes),
)
