"""DeepSpeed's own CUDA builders and entries such as ``9.0a`` in TORCH_CUDA_ARCH_LIST."""

from __future__ import annotations

import os
import re

from ds_fp6.integrations.patching import Hook, wrap

VARIABLE = "TORCH_CUDA_ARCH_LIST"


def portable(architectures: str) -> str:
    """``"8.0;9.0a+PTX"`` → ``"8.0;9.0+PTX"``: without the letters of architecture-specific features."""
    return re.sub(r"(\d+\.\d+)[af]", r"\1", architectures)


def _compute_capability_args(original, self, *args, **kwargs):
    """DeepSpeed reads each entry as two integers; none of its kernels uses an architecture's special features.

    A JIT build takes the list from the builder, which restores the variable afterwards; any other build takes it
    from the environment, where upstream leaves its own spelling of the list.
    """
    if getattr(self, "_jit_arch_list", None):
        self._jit_arch_list = portable(self._jit_arch_list)
    if VARIABLE in os.environ:
        os.environ[VARIABLE] = portable(os.environ[VARIABLE])
    return original(self, *args, **kwargs)


def _wrap_builder() -> None:
    from deepspeed.ops.op_builder.builder import CUDAOpBuilder

    wrap(CUDAOpBuilder, "compute_capability_args", _compute_capability_args)


HOOKS = (
    Hook("deepspeed.ops.op_builder.builder.CUDAOpBuilder", "died on architectures such as 9.0a", _wrap_builder),
)
