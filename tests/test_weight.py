"""``PackedWeight`` and the torch operators beneath it, on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import ds_fp6
from ds_fp6 import PackedWeight, ops
from ds_fp6.formats import E2M3, E3M2
from ds_fp6.pack import pack, to_device_layout
from ds_fp6.quantize import dequantize_reference, quantize, quantize_reference

SHAPES = [(1, 1), (3, 7), (64, 64), (65, 130)]


@pytest.mark.parametrize("n, k", SHAPES)
@pytest.mark.parametrize("mode", ["wf6af16", "wf5abf16", "wf6e2m3a32", "wf6af16g64"])
def test_from_dense_is_the_reference_and_multiplies_like_it(n, k, mode):
    dense = torch.randn(n, k)
    weight = PackedWeight.from_dense(dense, mode)
    codes, scales = quantize_reference(dense, weight.format, weight.group_size)
    assert weight.shape == (n, k)
    assert torch.equal(weight.packed, pack(codes, weight.format.bits))
    assert torch.equal(weight.scales, scales)
    expected = dequantize_reference(codes, scales, weight.format, weight.group_size)
    assert torch.equal(weight.dequantize(), expected)
    x, bias = torch.randn(5, k), torch.randn(n)
    y = ds_fp6.linear(x, weight, bias)
    exact = (x.double() @ expected.double().T + bias.double())
    assert torch.allclose(y.double(), exact, rtol=1e-5, atol=1e-5)
    assert torch.equal(weight.linear(x, bias), y)


def test_state_dict_round_trips_and_takes_exactly_bits_a_weight():
    weight = PackedWeight.from_dense(torch.randn(10, 640), "wf6af16g128")
    assert weight.packed.nbytes == 10 * 640 * 6 // 8
    assert weight.nbytes == weight.packed.nbytes + 10 * 5 * 4
    copy = PackedWeight.from_state_dict(weight.state_dict())
    assert (copy.format, copy.group_size, copy.shape) == (E3M2, 128, (10, 640))
    assert torch.equal(copy.dequantize(), weight.dequantize())
    assert weight.to("cpu") is weight and weight.to() is weight


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16, torch.bfloat16])
def test_a_cpus_layout_serves_x_of_any_type(dtype):
    dense = torch.randn(10, 70)
    weight = PackedWeight.from_dense(dense, "wf6abf16", dtype=dtype)
    assert weight.dtype is None and weight.to(dtype=dtype) is weight and weight.to("cpu", dtype) is weight
    assert torch.equal(weight.packed, PackedWeight.from_dense(dense, "wf6af16").packed)
    assert torch.equal(weight.packed, ops.quantize(dense, 3, 2, 0, None, dtype)[0])
    assert torch.equal(weight.packed, to_device_layout(weight.packed, E3M2, 70, dtype))
    copy = PackedWeight.from_state_dict(weight.state_dict(), dtype)
    for x_dtype in (torch.float32, torch.float16, torch.bfloat16):
        x = torch.randn(3, 70).to(x_dtype)
        assert torch.equal(copy.linear(x), weight.linear(x))


def test_a_format_is_accepted_in_place_of_a_mode():
    assert PackedWeight.from_dense(torch.randn(2, 3), E2M3).format == E2M3


def test_state_without_a_part_or_with_wrong_shapes_is_refused():
    state = PackedWeight.from_dense(torch.randn(4, 16), "wf6af16").state_dict()
    with pytest.raises(ValueError, match="scales"):
        PackedWeight.from_state_dict({"packed": state["packed"], "header": state["header"]})
    with pytest.raises(ValueError, match=r"\[4, 12\].*\[4, 11\]"):
        PackedWeight.from_state_dict({**state, "packed": state["packed"][:, :11]})
    with pytest.raises(ValueError, match="float32"):
        PackedWeight.from_state_dict({**state, "scales": state["scales"].half()})


def test_linear_refuses_what_does_not_fit():
    weight = PackedWeight.from_dense(torch.randn(4, 16), "wf6af16")
    with pytest.raises(ValueError, match=r"\[\.\.\., 16\].*\[2, 15\]"):
        ds_fp6.linear(torch.randn(2, 15), weight)
    with pytest.raises(ValueError, match="meta"):
        ds_fp6.linear(torch.randn(2, 16, device="meta"), weight)
    with pytest.raises((TypeError, ValueError), match="(?i)int|long"):
        ds_fp6.linear(torch.ones(2, 16, dtype=torch.int64), weight)
    assert ds_fp6.linear(torch.randn(2, 16), weight).isfinite().all(), "the process lives on"


def test_fakes_agree_with_the_kernels():
    dense, x = torch.randn(6, 20), torch.randn(2, 3, 20, dtype=torch.bfloat16)
    packed, scales = ops.quantize(dense, 3, 2, 8, None)
    real = [packed, scales, ops.dequantize(packed, scales, 3, 2, 8, 20, torch.float16),
            ops.linear(x, packed, scales, None, 3, 2, 8)]  # fmt: skip
    with FakeTensorMode() as mode:
        fake_dense, fake_x = mode.from_tensor(dense), mode.from_tensor(x)
        packed, scales = ops.quantize(fake_dense, 3, 2, 8, None)
        fake = [packed, scales, ops.dequantize(packed, scales, 3, 2, 8, 20, torch.float16),
                ops.linear(fake_x, packed, scales, None, 3, 2, 8)]  # fmt: skip
    assert [(t.shape, t.dtype) for t in fake] == [(t.shape, t.dtype) for t in real]


def test_a_gpus_layout_is_told_by_its_shape():
    with FakeTensorMode():
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            dense = torch.empty(70, 130, dtype=dtype, device="cuda")
            for x_dtype in (None, torch.float16, torch.bfloat16):
                packed, scales = ops.quantize(dense, 3, 2, 0, None, x_dtype)
                expected = x_dtype or (torch.bfloat16 if dtype == torch.bfloat16 else torch.float16)
                shape = [2, 3, 4, 128 * 6] if expected == torch.bfloat16 else [2, 3, 512 * 6]
                assert list(packed.shape) == shape and ops.layout_dtype(packed) == expected
                rows = ops.unpack(packed, 3, 2, 70, 130)
                assert list(rows.shape) == [70, 98]
                assert list(ops.pack(rows, 3, 2, 130, expected).shape) == shape
                weight = PackedWeight(E3M2, 0, 130, packed, scales)
                assert weight.dtype == expected and weight.to(dtype=expected) is weight
                assert weight.linear(torch.empty(2, 130, dtype=expected, device="cuda")).shape == (2, 70)
                for other in {torch.float32, torch.float16, torch.bfloat16} - {expected}:
                    with pytest.raises(TypeError, match=f"x is {other}, .* for {expected}; weight.to"):
                        weight.linear(torch.empty(2, 130, dtype=other, device="cuda"))
                with pytest.raises(ValueError, match=r"\[2, 3, 3072\] or \[2, 3, 4, 768\].*\[2, 3, "):
                    PackedWeight(E3M2, 0, 130, packed.new_empty([*shape[:-1], 767]), scales)
    with pytest.raises(TypeError, match="float16 or bfloat16.*torch.float32"):
        ops.packed_shape(torch.device("cuda"), 6, 70, 130, torch.float32)
    assert ops.packed_shape(torch.device("cpu"), 6, 70, 130, torch.float32) == (70, 98)


@pytest.mark.parametrize(
    "mode, dtype, expected",
    [
        ("wf6af16", torch.bfloat16, torch.float16), ("wf6abf16", torch.float16, torch.bfloat16),
        ("wf6a16", torch.bfloat16, torch.bfloat16), ("wf6a16", torch.float32, torch.float16),
        ("wf6a32", torch.bfloat16, torch.bfloat16), (E2M3, torch.float16, torch.float16),
        (E2M3, torch.bfloat16, torch.bfloat16), (E2M3, torch.float32, torch.float16),
    ],
)  # fmt: skip
def test_from_dense_lays_out_for_the_modes_type_else_the_weights(mode, dtype, expected, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "ds_fp6.weight.quantize", lambda *arguments: asked.append(arguments[-1]) or quantize(*arguments)
    )
    PackedWeight.from_dense(torch.randn(4, 16).to(dtype), mode)
    PackedWeight.from_dense(torch.randn(4, 16).to(dtype), mode, dtype=torch.bfloat16)
    assert asked == [expected, torch.bfloat16]


def test_torch_compile_traces_through_linear_in_one_graph():
    weight = PackedWeight.from_dense(torch.randn(8, 32), "wf6abf16")

    def layer(x):
        return torch.relu(ds_fp6.linear(x + 1, weight)) * 2

    x = torch.randn(3, 32)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))
