"""Gated activations: the product of the activated even columns and the odd ones."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ds_fp6.triton_ops import overlap

#: DeepSpeed's numbers of gated activations; its GELU is the one by tanh.
GEGLU, REGLU, SIGLU = 3, 4, 5

_COLUMNS = 1024


@triton.jit
def _gate_kernel(
    out,  # [rows, CHANNELS]
    x,  # [rows, 2 · CHANNELS]
    bias,  # [2 · CHANNELS], where BIASED
    CHANNELS: tl.constexpr, COLUMNS: tl.constexpr, ACTIVATION: tl.constexpr, BIASED: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        gdc_launch_dependents()
    start = tl.program_id(0) * COLUMNS
    column = start + tl.arange(0, COLUMNS)
    pair = 2 * start + tl.arange(0, 2 * COLUMNS)
    row = tl.program_id(1).to(tl.int64)
    if OVERLAP:
        gdc_wait()
    value = tl.load(x + row * (2 * CHANNELS) + pair, mask=pair < 2 * CHANNELS, other=0.0).to(tl.float32)
    if BIASED:
        value += tl.load(bias + pair, mask=pair < 2 * CHANNELS, other=0.0).to(tl.float32)
    gate, up = tl.split(tl.reshape(value, (COLUMNS, 2)))
    if ACTIVATION == 3:
        # tanh(z) = 1 - 2 / (exp(2z) + 1)
        z = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        active = 0.5 * gate * (2.0 - 2.0 / (tl.exp(2.0 * z) + 1.0))
    elif ACTIVATION == 4:
        active = tl.maximum(gate, 0.0)
    else:
        active = gate / (1.0 + tl.exp(-gate))
    tl.store(out + row * CHANNELS + column, (active * up).to(out.dtype.element_ty), mask=column < CHANNELS)


def gated_activation(out: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None, activation: int) -> None:
    """``out = act(gate) · up`` in fp32: x [..., 2N] with gate in its even columns and up in the odd ones, out [..., N].

    Raises ``ValueError`` for another activation than DeepSpeed's gated ones, or rows that are not contiguous.
    """
    if activation not in (GEGLU, REGLU, SIGLU):
        raise ValueError(f"gated activation {activation} is none of {(GEGLU, REGLU, SIGLU)}")
    if not (x.is_contiguous() and out.is_contiguous()):
        raise ValueError(f"rows must be contiguous, got strides {x.stride()} and {out.stride()}")
    channels = out.shape[-1]
    overlapped = overlap.supported(x.device)
    _gate_kernel[(triton.cdiv(channels, _COLUMNS), x.numel() // (2 * channels))](
        out, x, x if bias is None else bias.as_subclass(torch.Tensor),
        CHANNELS=channels, COLUMNS=_COLUMNS, ACTIVATION=activation, BIASED=bias is not None, OVERLAP=overlapped,
        num_warps=4, launch_pdl=overlapped,
    )  # fmt: skip
