"""``inference_core_ops``: linear layers, activations and norms.

Every operator writes its result into the output tensor that it is given; inputs and outputs may alias. Norms and
activations compute in fp32 and round once.
"""

from __future__ import annotations

from enum import IntEnum

import torch
import torch.nn.functional as F

#: DeepSpeed's ``ActivationType`` codes.
GELU, RELU, SILU, GEGLU, REGLU, SIGLU, IDENTITY = range(7)


class ExactActivation(IntEnum):
    """Activations with the error function, which some models were trained with, beside DeepSpeed's tanh ones."""

    GELU = 16
    GEGLU = 17


_ACTIVATIONS = {
    GELU: lambda x: F.gelu(x, approximate="tanh"),
    RELU: F.relu,
    SILU: F.silu,
    IDENTITY: lambda x: x,
    ExactActivation.GELU: F.gelu,
}
_GATES = {GEGLU: GELU, REGLU: RELU, SIGLU: SILU, ExactActivation.GEGLU: ExactActivation.GELU}

#: Bytes of fp32 weights that are expanded at a time, so that they are multiplied while they are still in L2.
_EXPANSION_BYTES = 1 << 20


def create_handle() -> None:
    """cuBLAS needs one; nothing here does."""


def blas_linear(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``out = x · weightᵀ``: x [..., K], weight [N, K], out [..., N], all of one dtype.

    An output that is wider than N keeps its last columns: qwen2-moe's shared-expert gate has one row and asks for 8.
    fp16 goes through fp32, a slice of the weight at a time: CPUs have no fp16 arithmetic worth the name, and the
    products of fp16 numbers are exact in fp32.
    """
    x, weight = x.reshape(-1, x.shape[-1]), weight.as_subclass(torch.Tensor)
    flat = out.view(-1, out.shape[-1])[:, : weight.shape[0]]
    if weight.dtype != torch.float16:
        torch.mm(x, weight.t(), out=flat)
        return out
    x = x.float()
    rows = max(16, _EXPANSION_BYTES // (4 * weight.shape[1]))
    for start in range(0, weight.shape[0], rows):
        flat[:, start : start + rows] = F.linear(x, weight[start : start + rows].float())
    return out


def activate(x: torch.Tensor, activation: int) -> torch.Tensor:
    """The activation of DeepSpeed's code ``activation``, in x's own dtype. Raises ``ValueError`` for a gated one."""
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation {activation} is none of {sorted(_ACTIVATIONS)}")
    return _ACTIVATIONS[activation](x)


def bias_activation(x: torch.Tensor, bias: torch.Tensor | None, activation: int) -> None:
    """``x = act(x + bias)`` in place: x [..., N], bias [N] or None."""
    if bias is None and activation == IDENTITY:
        return
    y = x.float() if bias is None else x.float() + bias.as_subclass(torch.Tensor).float()
    x.copy_(activate(y, activation))


def gated_activation(out: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None, activation: int) -> None:
    """``out = act(gate) · up``: x [..., 2N] with gate in its even columns and up in the odd ones, out [..., N]."""
    if activation not in _GATES:
        raise ValueError(f"gated activation {activation} is none of {sorted(_GATES)}")
    y = x.float() if bias is None else x.float() + bias.as_subclass(torch.Tensor).float()
    out.copy_(activate(y[..., 0::2], _GATES[activation]) * y[..., 1::2])


def _rms(x: torch.Tensor, gamma: torch.Tensor, eps: float) -> torch.Tensor:
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * gamma.as_subclass(torch.Tensor).float()


def rms_norm(out: torch.Tensor, x: torch.Tensor, gamma: torch.Tensor, eps: float) -> None:
    """``out = x / sqrt(mean(x²) + eps) · gamma`` over the last axis."""
    out.copy_(_rms(x, gamma, eps))


def rms_pre_norm(
    norm_out: torch.Tensor, res_out: torch.Tensor, norm_in: torch.Tensor, res_in: torch.Tensor,
    gamma: torch.Tensor, eps: float,
) -> None:
    """``res_out = res_in + norm_in; norm_out = rms_norm(res_out)``."""
    torch.add(res_in, norm_in, out=res_out)
    norm_out.copy_(_rms(res_out, gamma, eps))


def _layer_norm(x: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor, eps: float) -> torch.Tensor:
    gamma, beta = gamma.as_subclass(torch.Tensor).float(), beta.as_subclass(torch.Tensor).float()
    return F.layer_norm(x.float(), gamma.shape, gamma, beta, eps)


def layer_norm(out: torch.Tensor, x: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor, eps: float) -> None:
    """``out = (x - mean) / sqrt(variance + eps) · gamma + beta`` over the last axis."""
    out.copy_(_layer_norm(x, gamma, beta, eps))


def pre_layer_norm(
    res_out: torch.Tensor, norm_out: torch.Tensor, x: torch.Tensor, residual: torch.Tensor,
    gamma: torch.Tensor, beta: torch.Tensor, eps: float,
) -> None:
    """``res_out = x + residual; norm_out = layer_norm(res_out)``. NOTE: its outputs are not in rms_pre_norm's order."""
    torch.add(x, residual, out=res_out)
    norm_out.copy_(_layer_norm(res_out, gamma, beta, eps))


def post_layer_norm(
    out: torch.Tensor, x: torch.Tensor, residual: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor, eps: float
) -> None:
    """``out = layer_norm(x + residual)``."""
    out.copy_(_layer_norm(x + residual, gamma, beta, eps))
