"""Quantize and pack, dequantize and changes of layout on a GPU: bit-exact with the plain-torch reference."""

from __future__ import annotations

import pytest
import torch

from cases import fresh_generator, random_weight
from cuda_cases import needs_gpu
from ds_fp6 import PackedWeight, ops
from ds_fp6.formats import E3M2, Format, all_formats
from ds_fp6.pack import pack, to_canonical, to_device_layout
from ds_fp6.quantize import dequantize_reference, quantize, quantize_reference

pytestmark = needs_gpu

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 1), (3, 7), (64, 63), (65, 64), (16, 65), (129, 130), (17, 2055), (66, 4100)]
GROUP_SIZES = [0, 64, 7, 128, 1, 600, 16]


@pytest.fixture
def generator() -> torch.Generator:
    return fresh_generator()


def assert_same_bytes(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    actual = actual.cpu()
    assert actual.shape == expected.shape and actual.dtype == expected.dtype, f"{what}: {actual.shape} {actual.dtype}"
    as_ints = [t.view(torch.int32) if t.dtype == torch.float32 else t for t in (actual, expected)]
    different = (as_ints[0] != as_ints[1]).nonzero()
    if len(different):
        at = tuple(different[0].tolist())
        pytest.fail(f"{what}: {len(different)} differ, first at {list(at)}: {actual[at]} instead of {expected[at]}")


def check_quantize(weight: torch.Tensor, fmt: Format, group_size: int, scales: torch.Tensor | None = None) -> None:
    """Quantizes ``weight`` for x of both types."""
    codes, expected_scales = quantize_reference(weight, fmt, group_size, scales)
    n, k = weight.shape
    rows = pack(codes, fmt.bits)
    expected = dequantize_reference(codes, expected_scales, fmt, group_size).to(weight.dtype)
    on_gpu, given = weight.cuda(), None if scales is None else scales.cuda()
    for dtype in ops.LAYOUT_DTYPES:
        torch.full((1 << 20,), 255, dtype=torch.uint8, device="cuda")  # poisons what the allocator hands out next
        packed, actual_scales = quantize(on_gpu, fmt, group_size, given, dtype)
        what = f"{fmt}, {weight.dtype} {[n, k]}, groups of {group_size}, for x of {dtype}"
        assert packed.shape == ops.packed_shape(packed.device, fmt.bits, n, k, dtype), what
        assert_same_bytes(actual_scales, expected_scales, f"scales of {what}")
        assert_same_bytes(to_canonical(packed, fmt, n, k), rows, f"codes of {what}")
        # Equal tiles too: padding codes are 0 in both.
        assert_same_bytes(packed, to_device_layout(rows.cuda(), fmt, k, dtype).cpu(), f"tiles of {what}")
        dense = ops.dequantize(packed, actual_scales, fmt.exponent_bits, fmt.mantissa_bits, group_size, k, weight.dtype)
        assert_same_bytes(dense.float(), expected.float(), f"dequantized {what}")


@pytest.mark.parametrize("fmt", all_formats(), ids=str)
def test_quantize_is_the_reference_bit_for_bit(fmt, generator):
    for i, (n, k) in enumerate(SHAPES):
        for dtype in DTYPES:
            weight = random_weight(n, k, generator).to(dtype)
            check_quantize(weight, fmt, 0)
            check_quantize(weight, fmt, GROUP_SIZES[(i + fmt.bits) % len(GROUP_SIZES)])


@pytest.mark.parametrize("fmt", all_formats(), ids=str)
def test_every_midpoint_and_its_neighbours(fmt):
    values = torch.tensor(sorted(set(fmt.values)))
    points = torch.cat([values, (values[1:] + values[:-1]) / 2, torch.tensor([1e30, -3.4e38, 1e-45, -1e-45, -0.0])])
    infinity = torch.full_like(points, float("inf"))
    points = torch.cat([points, torch.nextafter(points, infinity), torch.nextafter(points, -infinity)])
    points = points[torch.isfinite(points)]
    check_quantize(points[None], fmt, 0, torch.ones(1, 1))


def test_rows_of_zeros_and_of_extreme_size():
    weight = torch.ones(6, 70)
    weight[0] = 0
    weight[1, 1:] = -0.0
    weight[2] *= 1e-45
    weight[3] *= 3e38
    weight[4] *= 2.0**-126
    weight[5, ::2] *= -1e-40
    check_quantize(weight, E3M2, 0)
    check_quantize(weight, E3M2, 16)


def test_strided_and_unaligned_weights(generator):
    wide = random_weight(40, 301, generator)
    for dtype in DTYPES:
        for view in (wide.to(dtype)[:, 1:200], wide.to(dtype)[::3, 5:6], wide.to(dtype)[1:, :256], wide.to(dtype).T):
            codes, scales = quantize_reference(view, E3M2)
            on_gpu = view.cuda() if view.is_contiguous() else _same_strides_on_gpu(view)
            packed, actual_scales = quantize(on_gpu, E3M2)
            assert_same_bytes(actual_scales, scales, f"scales of {view.dtype} {view.stride()}")
            assert_same_bytes(to_canonical(packed, E3M2, *view.shape), pack(codes, 6), f"{view.dtype} {view.stride()}")


def _same_strides_on_gpu(view: torch.Tensor) -> torch.Tensor:
    storage = torch.empty(view.untyped_storage().size() // view.element_size(), dtype=view.dtype, device="cuda")
    on_gpu = storage.as_strided(view.shape, view.stride(), view.storage_offset())
    on_gpu.copy_(view)
    return on_gpu


def test_a_large_layer(generator):
    weight = random_weight(1000, 8192, generator).half()
    for group_size in (0, 128):
        check_quantize(weight, E3M2, group_size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("group_size", [0, 32, 1000])
def test_what_is_not_finite_is_named(dtype, value, group_size, generator):
    weight = random_weight(70, 3000, generator).to(dtype).cuda()
    weight[33, 2891] = value
    weight[33, 2999] = value
    weight[69, 0] = value
    with pytest.raises(ValueError, match=r"weight\[33, 2891\] is -?(nan|inf)"):
        quantize(weight, E3M2, group_size)
    given = torch.ones(70, -(-3000 // group_size) if group_size else 1, device="cuda")
    with pytest.raises(ValueError, match=r"weight\[33, 2891\] is -?(nan|inf)"):
        quantize(weight, E3M2, group_size, given)
    weight.nan_to_num_(0, 0, 0)
    quantize(weight, E3M2, group_size)


@pytest.mark.parametrize("fmt", [E3M2, Format(4, 3)], ids=str)
def test_layouts_say_whose_they_are(fmt, generator):
    bits = fmt.exponent_bits, fmt.mantissa_bits
    for dtype in DTYPES:
        weight = random_weight(70, 130, generator).to(dtype).cuda()
        own, _ = ops.quantize(weight, *bits, 0)
        assert ops.layout_dtype(own) == (torch.float16 if dtype == torch.float32 else dtype)
        rows = to_canonical(own, fmt, 70, 130)
        for layout in ops.LAYOUT_DTYPES:
            packed, _ = ops.quantize(weight, *bits, 0, None, layout)
            assert ops.layout_dtype(packed) == layout
            assert torch.equal(packed, ops.pack(rows, *bits, 130, layout))
            if layout == ops.layout_dtype(own):
                assert torch.equal(packed, own)
            fakes = {"test_utils": ["test_faketensor"]}
            torch.library.opcheck(torch.ops.ds_fp6.quantize.default, (weight, *bits, 0, None, layout), **fakes)
            torch.library.opcheck(torch.ops.ds_fp6.pack.default, (rows, *bits, 130, layout), **fakes)
            torch.library.opcheck(torch.ops.ds_fp6.unpack.default, (packed, *bits, 70, 130), **fakes)


def test_bad_arguments_raise_and_leave_the_context_alive(generator):
    weight = random_weight(8, 64, generator).cuda()
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        scales = torch.ones(8, 1, device="cuda")
        scales[5, 0] = bad
        with pytest.raises(ValueError, match=r"scales\[5, 0\]"):
            quantize(weight, E3M2, 0, scales)
    with pytest.raises(ValueError, match="scales"):
        ops.quantize(weight, 3, 2, 0, torch.ones(8, 2, device="cuda"))
    with pytest.raises(ValueError, match="scales is on cpu"):
        ops.quantize(weight, 3, 2, 0, torch.ones(8, 1))
    with pytest.raises(TypeError, match="Double"):
        ops.quantize(weight.double(), 3, 2, 0)
    with pytest.raises(ValueError, match="N, K >= 1"):
        ops.quantize(weight[:0], 3, 2, 0)
    with pytest.raises(ValueError, match="mantissa_bits 7"):
        ops.quantize(weight, 3, 7, 0)
    with pytest.raises(TypeError, match="(?i)float16 or bfloat16.*float"):
        ops.quantize(weight, 3, 2, 0, None, torch.float32)
    for layout in ops.LAYOUT_DTYPES:
        packed, scales = ops.quantize(weight, 3, 2, 0, None, layout)
        with pytest.raises(ValueError, match="tiles of 8 x 65"):
            ops.dequantize(packed, scales, 3, 2, 0, 65, torch.float16)
        with pytest.raises(TypeError, match="dtype must be"):
            ops.dequantize(packed, scales, 3, 2, 0, 64, torch.int32)
        with pytest.raises(ValueError, match="rows of 64 codes of 6 bits"):
            ops.pack(torch.zeros(8, 47, dtype=torch.uint8, device="cuda"), 3, 2, 64, layout)
        with pytest.raises(ValueError, match="tiles of 65 x 64"):
            ops.unpack(packed, 3, 2, 65, 64)
        for cut in (packed[..., :-1], packed.flatten(), packed[0], packed.unsqueeze(0)):
            with pytest.raises(ValueError, match="tiles of 8 x 64"):
                ops.unpack(cut.contiguous(), 3, 2, 8, 64)
        assert torch.isfinite(ops.dequantize(packed, scales, 3, 2, 0, 64, torch.float16)).all()
    with pytest.raises(TypeError, match="(?i)float16 or bfloat16.*float"):
        ops.pack(torch.zeros(8, 48, dtype=torch.uint8, device="cuda"), 3, 2, 64, torch.float32)
    with pytest.raises(ValueError, match=r"\[1, 1, 3072\] or \[1, 1, 4, 768\]"):
        PackedWeight(E3M2, 0, 64, packed[..., :-1], scales)


@pytest.mark.parametrize("mode, dtype", [("wf6af16g64", torch.float16), ("wf6abf16g64", torch.bfloat16)])
def test_a_weight_moves_between_cpu_and_gpu(mode, dtype, generator):
    weight = random_weight(100, 200, generator)
    on_cpu = PackedWeight.from_dense(weight, mode)
    on_gpu = PackedWeight.from_dense(weight.cuda(), mode)
    assert on_cpu.dtype is None and on_gpu.dtype == dtype and on_cpu.to("cuda").dtype == torch.float16
    for there, back in ((on_cpu.to("cuda", dtype), on_gpu), (on_gpu.to("cpu"), on_cpu)):
        assert torch.equal(there.packed, back.packed) and torch.equal(there.scales, back.scales)
    assert torch.equal(on_cpu.dequantize(), on_gpu.dequantize().cpu())
