"""The op builders that DeepSpeed's inference engine asks an accelerator for.

Each ``load()`` returns an object with the operators' functions, as the compiled CUDA extension would have them. What
there is to build is the extension of the CPU kernels (``ds_fp6.ops``), once for all of them.
"""

from __future__ import annotations

from types import SimpleNamespace

from deepspeed.ops.op_builder.builder import OpBuilder

from ds_fp6 import ops
from ds_fp6.cpu import attention, compiled, core_ops, moe_ops, ragged_ops


class _CPUBuilder(OpBuilder):
    """A builder of operators that Python functions stand for."""

    BUILD_VAR = "DS_BUILD_FP6_CPU"
    NAME = ""
    OPERATORS: SimpleNamespace

    def __init__(self, name: str | None = None) -> None:
        super().__init__(name=name or self.NAME)

    def absolute_name(self) -> str:
        return f"ds_fp6.cpu.{self.NAME}"

    def sources(self) -> list[str]:
        return []

    def is_compatible(self, verbose: bool = False) -> bool:
        return True

    def load(self, verbose: bool = False) -> SimpleNamespace:
        ops.load("CPU")
        return self.OPERATORS


class InferenceCoreBuilder(_CPUBuilder):
    NAME = "inference_core_ops"
    OPERATORS = SimpleNamespace(
        create_handle=core_ops.create_handle,
        blas_linear=compiled.blas_linear,
        bias_activation=compiled.bias_activation,
        gated_activation=compiled.gated_activation,
        rms_norm=compiled.rms_norm,
        rms_pre_norm=compiled.rms_pre_norm,
        layer_norm=compiled.layer_norm,
        pre_layer_norm=compiled.pre_layer_norm,
        post_layer_norm=compiled.post_layer_norm,
    )


class RaggedUtilsBuilder(_CPUBuilder):
    NAME = "ragged_ops"
    OPERATORS = SimpleNamespace(
        allocate_fast_host_buffer=ragged_ops.allocate_fast_host_buffer,
        allocate_view_on=ragged_ops.allocate_view_on,
        allocate_view_like=ragged_ops.allocate_view_like,
    )


class RaggedOpsBuilder(_CPUBuilder):
    NAME = "ragged_device_ops"
    OPERATORS = SimpleNamespace(
        build_atoms=attention.build_atoms,
        flash_attn_by_atoms=compiled.flash_attn_by_atoms,
        kv_rotary_embeddings=compiled.kv_rotary_embeddings,
        kv_trained_rotary_embeddings=compiled.kv_trained_rotary_embeddings,
        linear_kv_copy=compiled.linear_kv_copy,
        ragged_embed=ragged_ops.ragged_embed,
        gather_for_logits=ragged_ops.gather_for_logits,
        top_k_gating=moe_ops.top_k_gating,
        moe_scatter=moe_ops.moe_scatter,
        moe_gather=moe_ops.moe_gather,
    )


class InferenceCutlassBuilder(_CPUBuilder):
    NAME = "cutlass_ops"
    OPERATORS = SimpleNamespace(
        moe_gemm=moe_ops.moe_gemm, mixed_gemm=moe_ops.mixed_gemm, mixed_moe_gemm=moe_ops.mixed_moe_gemm
    )


BUILDERS = {
    builder.__name__: builder
    for builder in (InferenceCoreBuilder, RaggedUtilsBuilder, RaggedOpsBuilder, InferenceCutlassBuilder)
}
