"""The reference quantizer: by brute force over all codes, against qtorch, and its errors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import ahead
import pytest
import torch

from ds_fp6.formats import E2M1, E2M2, E2M3, E3M1, E3M2, all_formats
from ds_fp6.quantize import SMALLEST_SCALE, compute_scales, decode, dequantize_reference, encode, quantize_reference

QTORCH_FORMATS = [E3M2, E2M2, E2M3, E3M1, E2M1]


def neighbours(values: torch.Tensor) -> torch.Tensor:
    """Each fp32 value, and the fp32 numbers next to it on either side."""
    infinity = torch.full_like(values, float("inf"))
    return torch.cat([values, torch.nextafter(values, infinity), torch.nextafter(values, -infinity)])


def codes_and_midpoints(fmt) -> torch.Tensor:
    """Every value of the format and every midpoint of two adjacent ones, with their fp32 neighbours."""
    values = torch.tensor(sorted(set(fmt.values)))
    midpoints = (values[1:] + values[:-1]) / 2
    beyond = torch.tensor([fmt.max * 1.1, fmt.max * 2, 1e30, 3.4e38, 1e-30, 1e-45])
    return neighbours(torch.cat([values, midpoints, beyond, -beyond]))


def nearest_by_search(t: torch.Tensor, fmt) -> torch.Tensor:
    """The nearest value in fp64, ties to the larger magnitude: what ``encode`` must agree with."""
    values = torch.tensor(sorted(set(fmt.values), key=abs), dtype=torch.float64)  # ties: the later one wins
    within = t.double().clamp(-4 * fmt.max, 4 * fmt.max)  # so that fp64 tells the distances apart
    distance = (within[:, None] - values).abs()
    best = distance.amin(dim=1, keepdim=True)
    last = (distance == best).to(torch.int8).flip(1).argmax(dim=1)
    return values.flip(0)[last].float()


@pytest.mark.parametrize("fmt", all_formats(), ids=str)
def test_encode_is_nearest_with_ties_away_from_zero(fmt):
    t = torch.cat([codes_and_midpoints(fmt), torch.randn(2000) * fmt.max / 3])
    rounded = decode(encode(t, fmt), fmt)
    assert torch.equal(rounded, nearest_by_search(t, fmt))
    assert not torch.signbit(rounded[rounded == 0]).any(), "zero has no sign"


@pytest.mark.parametrize("fmt", all_formats(), ids=str)
def test_decode_then_encode_returns_every_code_but_minus_zero(fmt):
    codes = torch.arange(2**fmt.bits, dtype=torch.uint8)
    expected = codes.clone()
    expected[2 ** (fmt.bits - 1)] = 0
    assert torch.equal(encode(decode(codes, fmt), fmt), expected)


def qtorch_compiled(folder: Path) -> subprocess.CompletedProcess:
    """qtorch compiles itself when it is first imported, into the user's cache of torch's extensions."""
    return ahead.run(sys.executable, "-c", "import qtorch.quant")


@ahead.made_by(qtorch_compiled)
@pytest.mark.parametrize("fmt", QTORCH_FORMATS, ids=str)
def test_encode_rounds_as_qtorch_does(made, fmt):
    """Over all codes, all midpoints and their fp32 neighbours.

    qtorch adds 2^(1-bias) to a subnormal before it rounds, which rounds twice: the fp32 neighbour just below a
    midpoint of two subnormals becomes the midpoint, and then goes away from zero. Those inputs, and only
    those, may differ; the reference gives the value that is really nearer.
    """
    pytest.importorskip("qtorch", reason="qtorch is not installed")
    assert made.returncode == 0, made.stderr
    from qtorch import quant

    t = codes_and_midpoints(fmt)
    ours = decode(encode(t, fmt), fmt)
    theirs = quant.float_quantize(t, exp=fmt.exponent_bits, man=fmt.mantissa_bits, rounding="nearest")

    step = fmt.smallest
    subnormal_midpoints = torch.arange(2**fmt.mantissa_bits) * step + step / 2
    below = torch.nextafter(subnormal_midpoints, torch.zeros(()))
    double_rounded = torch.cat([below, -below])
    differ = t[ours != theirs]
    assert set(differ.tolist()) == set(double_rounded.tolist())
    assert not torch.signbit(theirs[theirs == 0]).any()


def test_qtorch_backend_gives_the_reference_codes_on_random_weights():
    pytest.importorskip("qtorch.quant", reason="qtorch is not installed")
    weight = torch.randn(33, 65)
    codes, scales = quantize_reference(weight, E3M2, 16)
    other, other_scales = quantize_reference(weight, E3M2, 16, backend="qtorch")
    assert torch.equal(scales, other_scales)
    assert (codes != other).sum() <= 1, "beyond qtorch's double rounding"


@pytest.mark.parametrize("group_size", [0, 1, 5, 64, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_error_stays_within_half_a_step_of_the_largest_magnitude(dtype, group_size):
    weight = torch.randn(7, 130).to(dtype)
    codes, scales = quantize_reference(weight, E3M2, group_size)
    groups = -(-130 // group_size) if group_size else 1
    assert scales.shape == (7, groups) and scales.dtype == torch.float32
    restored = dequantize_reference(codes, scales, E3M2, group_size)
    # e3m2 keeps 3 significant bits: half a unit of the last is 2^-3 of a normal value, a subnormal's step is 1/448 of the max
    per_weight = scales.repeat_interleave(group_size, 1)[:, :130] if group_size else scales
    bound = torch.maximum(weight.float().abs() * 2**-3, per_weight * E3M2.smallest / 2)
    assert ((restored - weight.float()).abs() <= bound * (1 + 1e-6)).all()


def test_scales_of_zero_tiny_and_huge_rows():
    weight = torch.tensor([[0.0, 0.0], [1e-44, -1e-45], [3e38, -3e38]])
    scales = compute_scales(weight, E3M2)
    assert scales[:, 0].tolist() == [1.0, SMALLEST_SCALE, (torch.tensor(3e38) / 28).item()]
    codes, _ = quantize_reference(weight, E3M2)
    assert codes[0].tolist() == [0, 0]
    assert decode(codes, E3M2)[2].tolist() == [28.0, -28.0]


def test_given_scales_are_used_and_saturate():
    weight = torch.tensor([[1.0, -100.0]])
    codes, scales = quantize_reference(weight, E3M2, scales=torch.tensor([[0.5]]))
    assert decode(codes, E3M2).tolist() == [[2.0, -28.0]] and scales.item() == 0.5


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_named_by_position(bad):
    weight = torch.ones(4, 9)
    weight[2, 7] = bad
    with pytest.raises(ValueError, match=r"\[2, 7\]"):
        quantize_reference(weight, E3M2)


def test_wrong_dtypes_shapes_and_groups_are_refused():
    with pytest.raises(TypeError, match="int32"):
        quantize_reference(torch.ones(2, 2, dtype=torch.int32), E3M2)
    for shape in [(4,), (0, 4), (4, 0), (2, 2, 2)]:
        with pytest.raises(ValueError, match="N, K"):
            quantize_reference(torch.ones(shape), E3M2)
    with pytest.raises(ValueError, match="-1"):
        quantize_reference(torch.ones(2, 2), E3M2, group_size=-1)
    with pytest.raises(ValueError, match="scales must be"):
        quantize_reference(torch.ones(2, 4), E3M2, 2, scales=torch.ones(2, 1))
    with pytest.raises(ValueError, match=r"scales\[1, 0\] is 0.0"):
        quantize_reference(torch.ones(2, 4), E3M2, scales=torch.tensor([[1.0], [0.0]]))
    with pytest.raises(ValueError, match="numpy"):
        quantize_reference(torch.ones(2, 4), E3M2, backend="numpy")
