"""Fused quantize+pack and dequantize on every instruction set this CPU has: the reference, bit for bit."""

from __future__ import annotations

import pytest
import torch

from cases import CPU_ISAS, GROUP_SIZES, WEIGHT_SHAPES, fresh_generator, random_weight, use_isa
from ds_fp6 import ops
from ds_fp6.formats import E3M2, Format, all_formats
from ds_fp6.pack import pack, unpack
from ds_fp6.quantize import dequantize_reference, encode, quantize, quantize_reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


# avx512_vbmi and avx512_bf16 share these functions.
@pytest.fixture(params=[name for name in CPU_ISAS if name != "avx512_vbmi"])
def isa(request):
    yield from use_isa(request.param)


@pytest.fixture
def generator() -> torch.Generator:
    return fresh_generator()


def assert_same_bytes(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    assert actual.shape == expected.shape and actual.dtype == expected.dtype, f"{what}: {actual.shape} {actual.dtype}"
    as_ints = [t.view(torch.int32) if t.dtype == torch.float32 else t for t in (actual, expected)]
    different = (as_ints[0] != as_ints[1]).nonzero()
    if len(different):
        at = tuple(different[0].tolist())
        pytest.fail(f"{what}: {len(different)} differ, first at {list(at)}: {actual[at]} instead of {expected[at]}")


def check_quantize(weight: torch.Tensor, fmt: Format, group_size: int, scales: torch.Tensor | None = None) -> None:
    codes, expected_scales = quantize_reference(weight, fmt, group_size, scales)
    packed, actual_scales = quantize(weight, fmt, group_size, scales)
    what = f"{fmt}, {weight.dtype} {list(weight.shape)}, groups of {group_size}"
    assert_same_bytes(actual_scales, expected_scales, f"scales of {what}")
    assert_same_bytes(packed, pack(codes, fmt.bits), f"codes of {what}")


@pytest.mark.parametrize("fmt", all_formats(), ids=str)
def test_quantize_is_the_reference_bit_for_bit(isa, fmt, generator):
    for i, (n, k) in enumerate(WEIGHT_SHAPES):
        weight = random_weight(n, k, generator).to(DTYPES[i % 3])
        check_quantize(weight, fmt, 0)
        check_quantize(weight, fmt, GROUP_SIZES[(i + fmt.bits) % len(GROUP_SIZES)])


@pytest.mark.parametrize("fmt", all_formats(), ids=str)
def test_every_midpoint_and_its_neighbours(isa, fmt):
    values = torch.tensor(sorted(set(fmt.values)))
    points = torch.cat([values, (values[1:] + values[:-1]) / 2, torch.tensor([1e30, -3.4e38, 1e-45, -1e-45, -0.0])])
    infinity = torch.full_like(points, float("inf"))
    points = torch.cat([points, torch.nextafter(points, infinity), torch.nextafter(points, -infinity)])
    one = torch.ones(1, 1)
    packed, _ = quantize(points[None], fmt, 0, one)
    codes = unpack(packed, fmt.bits, len(points))[0]
    expected = encode(points, fmt)
    wrong = (codes != expected).nonzero()
    assert not len(wrong), [(points[i].item(), codes[i].item(), expected[i].item()) for i in wrong[:5, 0]]


def test_magnitudes_from_the_smallest_to_the_largest(isa, generator):
    powers = torch.tensor([-149, -140, -127, -126, -100, -24, 0, 60, 126, 127], dtype=torch.float64)
    weight = torch.rand((len(powers), 70), generator=generator, dtype=torch.float64) * 2 - 1
    weight = (weight * torch.exp2(powers)[:, None]).float()
    weight[3] = 0
    weight[4, 5:] = 0
    for fmt in (E3M2, Format(5, 2), Format(1, 6), Format(2, 0)):
        for group_size in (0, 7):
            check_quantize(weight, fmt, group_size)


def test_strided_rows_and_columns(isa, generator):
    wide = random_weight(33, 200, generator)
    check_quantize(wide[:, 17:146], E3M2, 0)
    check_quantize(wide.t(), E3M2, 64)
    check_quantize(wide[::2].bfloat16(), E3M2, 64)


def test_given_scales_are_used(isa, generator):
    weight = random_weight(9, 130, generator)
    for group_size, groups in ((0, 1), (64, 3), (1000, 1)):
        scales = torch.rand((9, groups), generator=generator) + 1e-3
        check_quantize(weight, E3M2, group_size, scales)


@pytest.mark.parametrize("fmt", all_formats(), ids=str)
def test_dequantize_is_the_reference_bit_for_bit(isa, fmt, generator):
    for i, (n, k) in enumerate(WEIGHT_SHAPES):
        group_size = GROUP_SIZES[i % len(GROUP_SIZES)]
        codes = torch.randint(0, 2**fmt.bits, (n, k), dtype=torch.uint8, generator=generator)
        groups = -(-k // group_size) if group_size else 1
        scales = torch.rand((n, groups), generator=generator)
        expected = dequantize_reference(codes, scales, fmt, group_size)
        for dtype in (DTYPES[i % 3], DTYPES[(i + fmt.bits) % 3]):
            actual = ops.dequantize(
                pack(codes, fmt.bits), scales, fmt.exponent_bits, fmt.mantissa_bits, group_size, k, dtype
            )
            assert actual.dtype == dtype
            what = f"{fmt}, {dtype} {[n, k]}, groups of {group_size}"
            assert_same_bytes(actual.float(), expected.to(dtype).float(), what)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_non_finite_weights_are_named_by_position(isa, dtype, bad):
    weight = torch.ones(600, 130, dtype=dtype)
    weight[417, 128] = weight[417, 129] = weight[590, 3] = bad
    with pytest.raises(ValueError, match=r"weight\[417, 128\] is -?(nan|inf)"):
        quantize(weight, E3M2)


def test_bad_arguments_carry_their_values():
    weight = torch.ones(4, 8)
    q = ops.quantize
    with pytest.raises(TypeError, match="[Dd]ouble"):
        q(weight.double(), 3, 2, 0)
    with pytest.raises(ValueError, match=r"\[8\]"):
        q(weight[0], 3, 2, 0)
    with pytest.raises(ValueError, match=r"\[0, 8\]"):
        q(weight[:0], 3, 2, 0)
    with pytest.raises(ValueError, match="exponent_bits 6"):
        q(weight, 6, 2, 0)
    with pytest.raises(ValueError, match="mantissa_bits -1"):
        q(weight, 4, -1, 0)
    with pytest.raises(ValueError, match="-64"):
        q(weight, 3, 2, -64)
    with pytest.raises(ValueError, match=r"\[4, 2\].*\[4, 1\]"):
        q(weight, 3, 2, 4, torch.ones(4, 1))
    with pytest.raises(ValueError, match=r"scales\[2, 0\] is 0"):
        q(weight, 3, 2, 0, torch.tensor([[1.0], [1.0], [0.0], [1.0]]))
    with pytest.raises(ValueError, match=r"\[4, 6\].*\[4, 7\]"):
        ops.dequantize(torch.zeros(4, 7, dtype=torch.uint8), torch.ones(4, 1), 3, 2, 0, 8, torch.float32)
    with pytest.raises(TypeError, match="[Dd]ouble"):
        ops.dequantize(torch.zeros(4, 6, dtype=torch.uint8), torch.ones(4, 1), 3, 2, 0, 8, torch.float64)
    with pytest.raises(ValueError, match="in_features must be at least 1, got 0"):
        ops.dequantize(torch.zeros(4, 0, dtype=torch.uint8), torch.ones(4, 1), 3, 2, 0, 0, torch.float32)
