"""Which norms and gated activations the engine runs on a GPU: Triton's kernels of this package, or DeepSpeed's own.

They compute the same. Ours let the linear layer behind them start ahead, which it uses to fetch its weights. The
choice holds for ``argmax`` too.
"""

from __future__ import annotations

from types import SimpleNamespace

from ds_fp6.integrations.deepspeed import triton_choice
from ds_fp6.integrations.deepspeed.accelerator import on_cpu
from ds_fp6.integrations.patching import Hook, wrap

#: ``triton`` or ``upstream``; unset is triton where it can be used.
VARIABLE = "DS_FP6_POINTWISE"


def chosen(cpu: bool) -> tuple[str, str]:
    """``triton`` or ``upstream``, and why. ``cpu``: whether the engine runs on a CPU.

    Raises ``ValueError`` for another value of the variable, or one that asks for what cannot be had.
    """
    return triton_choice.chosen(VARIABLE, cpu)


def _init_norm(original, self, channels, fp_dtype, epsilon=1e-5) -> None:
    original(self, channels, fp_dtype, epsilon)
    if chosen(on_cpu())[0] == "triton":
        from ds_fp6.triton_ops import norm

        self.inf_module = SimpleNamespace(rms_norm=norm.rms_norm, rms_pre_norm=norm.rms_pre_norm)


def _init_gate(original, self, channels, fp_dtype, act_fn) -> None:
    original(self, channels, fp_dtype, act_fn)
    if chosen(on_cpu())[0] == "triton":
        from ds_fp6.triton_ops import gate

        self.kernel = gate.gated_activation


def _wrap_kernels() -> None:
    from deepspeed.inference.v2.kernels import core_ops
    from deepspeed.inference.v2.kernels.core_ops.cuda_rms_norm.rms_norm_base import CUDARMSNormBase

    wrap(CUDARMSNormBase, "__init__", _init_norm)
    wrap(core_ops.CUDAGatedActivation, "__init__", _init_gate)


HOOKS = (
    Hook("CUDARMSNormBase, CUDAGatedActivation", "GPU: kernels that overlap with the next", _wrap_kernels),
)
