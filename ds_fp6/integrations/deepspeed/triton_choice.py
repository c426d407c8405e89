"""Settings that choose between Triton's kernels of this package and DeepSpeed's own."""

from __future__ import annotations

import os

from ds_fp6 import triton_ops

CHOICES = ("triton", "upstream")


def chosen(variable: str, cpu: bool) -> tuple[str, str]:
    """What the environment variable ``variable`` chooses, and why: unset is triton on a GPU, where it can be used.

    ``cpu``: whether the engine runs on a CPU. Raises ``ValueError`` for another value of the variable, or one that
    asks for what cannot be had.
    """
    text = os.environ.get(variable, "").strip()
    if text and text not in CHOICES:
        raise ValueError(f"{variable} must be {' or '.join(CHOICES)}, got {text!r}")
    if text == "upstream":
        return "upstream", f"{variable}=upstream"
    on_cpu = cpu and not (text and interpreted())
    problem = "the engine runs on a CPU" if on_cpu else triton_ops.problem()
    if text and problem:
        raise ValueError(f"{variable}=triton cannot be had: {problem}")
    if problem:
        return "upstream", problem
    return "triton", f"{variable}=triton" if text else "default on a GPU"


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on a CPU and slowly, as TRITON_INTERPRET=1 asks for."""
    return os.environ.get("TRITON_INTERPRET") == "1"
