"""Triton's norms and gated activations against plain torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from triton_device import DEVICE, DTYPES

from ds_fp6.triton_ops import gate, norm, overlap

EPSILON = 1e-6


def random(*shape: int, dtype: torch.dtype, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype).to(DEVICE)


def expected_norm(x: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    x = x.double()
    return x * (x.square().mean(-1, keepdim=True) + EPSILON).rsqrt() * gamma.double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [64, 1000, 4096])
def test_norms(channels, dtype):
    x, residual = (random(3, channels, dtype=dtype, scale=3, seed=i) for i in range(2))
    gamma = random(channels, dtype=dtype, seed=2)
    tolerance = dict(rtol=2 * torch.finfo(dtype).eps, atol=1e-3)
    out = torch.empty_like(x)
    norm.rms_norm(out, x, gamma, EPSILON)
    torch.testing.assert_close(out.double(), expected_norm(x, gamma), **tolerance)
    total = (x.float() + residual.float()).to(dtype)
    # The residual is its own output in the engine.
    norm.rms_pre_norm(out, residual, x, residual, gamma, EPSILON)
    assert torch.equal(residual, total)
    torch.testing.assert_close(out.double(), expected_norm(total, gamma), **tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("activation", [gate.GEGLU, gate.REGLU, gate.SIGLU])
def test_gates(activation, biased, dtype):
    x = random(3, 2 * 1100, dtype=dtype, scale=4)
    x[0, :4] = torch.tensor([-100.0, 1, 100.0, 1], dtype=dtype)
    bias = random(2 * 1100, dtype=dtype, seed=1) if biased else None
    out = torch.empty(3, 1100, dtype=dtype, device=DEVICE)
    gate.gated_activation(out, x, bias, activation)
    y = x.double() if bias is None else x.double() + bias.double()
    functions = {gate.GEGLU: lambda g: F.gelu(g, approximate="tanh"), gate.REGLU: F.relu, gate.SIGLU: F.silu}
    expected = functions[activation](y[:, 0::2]) * y[:, 1::2]
    torch.testing.assert_close(out.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-3)


def test_bad_input_is_refused():
    x = random(4, 8, dtype=torch.float16)
    with pytest.raises(ValueError, match="activation 1 is none of"):
        gate.gated_activation(x[:, :4].contiguous(), x, None, 1)
    with pytest.raises(ValueError, match="rows must be contiguous"):
        gate.gated_activation(x[:, :4], x, None, gate.SIGLU)
    with pytest.raises(ValueError, match="rows must be contiguous"):
        norm.rms_norm(x[:, :4], x[:, :4], x[0, :4], EPSILON)


def test_dependent_launch_can_be_turned_off(monkeypatch):
    monkeypatch.delenv(overlap.VARIABLE, raising=False)
    assert overlap.wanted()
    monkeypatch.setenv(overlap.VARIABLE, "0")
    assert not overlap.wanted()
    monkeypatch.setenv(overlap.VARIABLE, "off")
    with pytest.raises(ValueError, match="must be 0 or 1, got 'off'"):
        overlap.wanted()
