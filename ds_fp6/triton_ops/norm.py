"""RMS norm, with the addition of the residual where there is one, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ds_fp6.triton_ops import overlap, plan


@triton.jit
def _rms_norm_kernel(
    out, residual_out,  # [rows, CHANNELS]
    x, residual,  # [rows, CHANNELS]
    gamma,  # [CHANNELS]
    epsilon,
    CHANNELS: tl.constexpr, COLUMNS: tl.constexpr, ADDS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        gdc_launch_dependents()
    column = tl.arange(0, COLUMNS)
    inside = column < CHANNELS
    scale = tl.load(gamma + column, mask=inside, other=0.0).to(tl.float32)
    at = tl.program_id(0).to(tl.int64) * CHANNELS + column
    if OVERLAP:
        gdc_wait()
    value = tl.load(x + at, mask=inside, other=0.0)
    if ADDS:
        value = (value.to(tl.float32) + tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)).to(value.dtype)
        tl.store(residual_out + at, value, mask=inside)
    value = value.to(tl.float32)
    mean_square = tl.sum(value * value, 0) / CHANNELS
    tl.store(out + at, (value * tl.rsqrt(mean_square + epsilon) * scale).to(out.dtype.element_ty), mask=inside)


def _launch(out, residual_out, x, residual, gamma, epsilon: float, adds: bool) -> None:
    channels = x.shape[-1]
    if not (x.is_contiguous() and out.is_contiguous()):
        raise ValueError(f"rows must be contiguous, got strides {x.stride()} and {out.stride()}")
    overlapped = overlap.supported(x.device)
    _rms_norm_kernel[(x.numel() // channels,)](
        out, residual_out, x, residual, gamma.as_subclass(torch.Tensor), epsilon,
        CHANNELS=channels, COLUMNS=plan.power_of_two(channels), ADDS=adds, OVERLAP=overlapped,
        num_warps=8 if channels > 2048 else 4, launch_pdl=overlapped,
    )  # fmt: skip


def rms_norm(out: torch.Tensor, x: torch.Tensor, gamma: torch.Tensor, epsilon: float) -> None:
    """``out = x / sqrt(mean(x²) + epsilon) · gamma`` over the last axis, in fp32. ``out`` may be ``x``."""
    _launch(out, out, x, x, gamma, epsilon, adds=False)


def rms_pre_norm(
    norm_out: torch.Tensor, residual_out: torch.Tensor, x: torch.Tensor, residual: torch.Tensor,
    gamma: torch.Tensor, epsilon: float,
) -> None:  # fmt: skip
    """``residual_out = residual + x; norm_out = rms_norm(residual_out)``. Outputs may be the inputs."""
    _launch(norm_out, residual_out, x, residual, gamma, epsilon, adds=True)
