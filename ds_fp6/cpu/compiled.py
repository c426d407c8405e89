"""The operators that matter for speed, as the extension has them: ``csrc/cpu/ragged_*``.

Each function is the twin of the one of that name in ``core_ops``, ``ragged_ops`` or ``attention``, in plain torch,
and falls back on it for what the extension does not cover.
"""

from __future__ import annotations

import functools

import torch

from ds_fp6.cpu import attention, core_ops, ragged_ops

_ops = torch.ops.ds_fp6

#: The extension's number for each activation, which it computes with DeepSpeed's tanh where it is a GELU.
_ACTIVATIONS = {core_ops.GELU: 0, core_ops.RELU: 1, core_ops.SILU: 2, core_ops.IDENTITY: 3}
_GATES = {core_ops.GEGLU: 0, core_ops.REGLU: 1, core_ops.SIGLU: 2}

#: Rows of x up to which an fp16 weight is expanded in registers, rather than to fp32 for a BLAS.
_FEW_ROWS = 16

#: Frequencies → cosines and sines of every position so far, fp32 [positions, rotary / 2]. Frequencies are named by
#: (rotary dimensions, theta) where these make them, else by their values.
_tables: dict[tuple, tuple[torch.Tensor, torch.Tensor]] = {}
_NO_ROTATION = torch.empty((0, 0))


def _plain(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """Parameters are a subclass of Tensor, which dispatch would go through Python for."""
    return tensor if tensor is None or type(tensor) is torch.Tensor else tensor.as_subclass(torch.Tensor)


def blas_linear(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    weight = _plain(weight)
    x_rows = x.view(-1, x.shape[-1])
    if weight.dtype != torch.float16 or len(x_rows) > _FEW_ROWS:
        return core_ops.blas_linear(out, x, weight)
    _ops.ragged_dense(out.view(-1, out.shape[-1])[:, : weight.shape[0]], x_rows, weight)
    return out


def bias_activation(x: torch.Tensor, bias: torch.Tensor | None, activation: int) -> None:
    if activation not in _ACTIVATIONS:
        core_ops.bias_activation(x, bias, activation)
    elif bias is not None or activation != core_ops.IDENTITY:
        _ops.ragged_activation(x, x, _plain(bias), _ACTIVATIONS[activation], False)


def gated_activation(out: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None, activation: int) -> None:
    if activation not in _GATES:
        core_ops.gated_activation(out, x, bias, activation)
    else:
        _ops.ragged_activation(out, x, _plain(bias), _GATES[activation], True)


def rms_norm(out: torch.Tensor, x: torch.Tensor, gamma: torch.Tensor, eps: float) -> None:
    _ops.ragged_norm(out, None, x, None, _plain(gamma), None, eps)


def rms_pre_norm(
    norm_out: torch.Tensor, res_out: torch.Tensor, norm_in: torch.Tensor, res_in: torch.Tensor,
    gamma: torch.Tensor, eps: float,
) -> None:
    _ops.ragged_norm(norm_out, res_out, norm_in, res_in, _plain(gamma), None, eps)


def layer_norm(out: torch.Tensor, x: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor, eps: float) -> None:
    _ops.ragged_norm(out, None, x, None, _plain(gamma), _plain(beta), eps)


def pre_layer_norm(
    res_out: torch.Tensor, norm_out: torch.Tensor, x: torch.Tensor, residual: torch.Tensor,
    gamma: torch.Tensor, beta: torch.Tensor, eps: float,
) -> None:
    _ops.ragged_norm(norm_out, res_out, x, residual, _plain(gamma), _plain(beta), eps)


def post_layer_norm(
    out: torch.Tensor, x: torch.Tensor, residual: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor, eps: float
) -> None:
    _ops.ragged_norm(out, out, x, residual, _plain(gamma), _plain(beta), eps)


def _table(name: tuple, frequencies, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``frequencies()``, named ``name``, times the positions up to at least ``positions``: cosines and sines."""
    table = _tables.get(name)
    if table is None or len(table[0]) < positions:
        # The next power of two, so that a sequence that grows by a token does not make a table each time.
        count = 1 << max(positions - 1, 255).bit_length()
        angles = torch.arange(count).float().unsqueeze(1) * frequencies()
        table = _tables[name] = angles.cos(), angles.sin()
    return table


def _rotate(name: tuple, frequencies, *arguments: torch.Tensor) -> None:
    cache, q, k, v, _batch, sequences, tokens, pointers = arguments
    positions = 1
    while True:
        cos, sin = _table(name, frequencies, positions)
        positions = _ops.ragged_rotary(cache, q, k, v, cos, sin, sequences, tokens, pointers)
        if positions <= len(cos):
            return


def kv_rotary_embeddings(
    cache: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rotary_dim: int, theta: float,
    batch: torch.Tensor, sequences: torch.Tensor, tokens: torch.Tensor, pointers: torch.Tensor,
) -> None:
    name = (rotary_dim, theta)
    frequencies = functools.partial(ragged_ops.inverse_frequencies, rotary_dim, theta)
    _rotate(name, frequencies, cache, q, k, v, batch, sequences, tokens, pointers)


def kv_trained_rotary_embeddings(
    cache: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, inv_freq: torch.Tensor,
    batch: torch.Tensor, sequences: torch.Tensor, tokens: torch.Tensor, pointers: torch.Tensor,
) -> None:
    name = ("trained", *inv_freq.tolist())
    _rotate(name, lambda: _plain(inv_freq), cache, q, k, v, batch, sequences, tokens, pointers)


def linear_kv_copy(
    cache: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    batch: torch.Tensor, sequences: torch.Tensor, tokens: torch.Tensor, pointers: torch.Tensor,
) -> None:
    _ops.ragged_rotary(cache, q, k, v, _NO_ROTATION, _NO_ROTATION, sequences, tokens, pointers)


def flash_attn_by_atoms(
    out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, atoms: torch.Tensor, scale: float,
    causal: bool, window: int | None = None,
) -> None:
    if not causal:
        attention.flash_attn_by_atoms(out, q, k, v, atoms, scale, causal, window)
    else:
        _ops.ragged_attention(out, q, k, v, atoms, scale, window or 0)
