"""The linear layer on a GPU against fp64: every format and activation type, awkward sizes, groups, bias, errors."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from cases import GPU_SHAPES, GPU_TOKENS, fresh_generator
from cuda_cases import ROUNDING, Expected, RandomWeight, needs_gpu, random_x
from ds_fp6 import PackedWeight, ops
from ds_fp6 import linear as packed_linear
from ds_fp6.formats import E2M1, E2M2, E2M3, E3M2, Format, all_formats

pytestmark = needs_gpu

DTYPES = [torch.float16, torch.bfloat16]
FEW_FORMATS = [E3M2, E2M2, E2M1, E2M3, Format(4, 3), Format(5, 2)]


@pytest.fixture
def generator() -> torch.Generator:
    return fresh_generator()


@pytest.fixture(params=["", "sm80"], ids=["best", "sm80"])
def kernel(request) -> Iterator[str]:
    """The kernel that the heuristics choose, and the one for every architecture."""
    ops.load("CUDA")
    torch.ops.ds_fp6.select_cuda_kernel(request.param)
    yield request.param
    torch.ops.ds_fp6.select_cuda_kernel("")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fmt", all_formats(), ids=str)
def test_every_format_for_every_number_of_tokens(kernel, fmt, dtype, generator):
    for n, k in GPU_SHAPES:
        weight = RandomWeight(fmt, n, k, 0, generator)
        x = random_x(max(GPU_TOKENS), k, dtype, generator)
        expected = Expected(x, weight)
        for m in GPU_TOKENS:
            expected.check(weight.linear(x[:m]), f"{fmt} {dtype} {m} x {n} x {k} {kernel}", m)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fmt", FEW_FORMATS, ids=str)
@pytest.mark.parametrize(
    "shape", [(8192, 8192), (4096, 4096), (6144, 4096), (29568 // 8, 8192), (8192, 29568 // 8)], ids=str
)
def test_large_layers(kernel, fmt, dtype, shape, generator):
    weight = RandomWeight(fmt, *shape, 0, generator)
    bias = torch.randn(shape[0], generator=generator).to(dtype).cuda()
    x = random_x(768, shape[1], dtype, generator)
    expected = Expected(x, weight, bias)
    for m in (1, 3, 8, 9, 16, 17, 32, 33, 64, 96, 100, 128, 200, 257, 768):
        expected.check(weight.linear(x[:m], bias), f"{fmt} {dtype} {m} x {shape}", m)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group_size", [16, 48, 64, 128, 192, 7, 1, 100, 5000])
@pytest.mark.parametrize("fmt", FEW_FORMATS, ids=str)
def test_scales_of_groups(fmt, group_size, dtype, generator):
    for n, k in [(1, 8), (65, 127), (130, 640), (257, 3696)]:
        weight = RandomWeight(fmt, n, k, group_size, generator)
        x = random_x(300, k, dtype, generator)
        expected = Expected(x, weight)
        for m in (1, 16, 17, 64, 65, 300):
            expected.check(weight.linear(x[:m]), f"{fmt} {dtype} {m} x {n} x {k}, groups of {group_size}", m)


@pytest.mark.parametrize("bias_dtype", [None, torch.float32], ids=["x's type", "fp32"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bias(kernel, dtype, bias_dtype, generator):
    for n, k in [(7, 8), (200, 320), (1024, 1024)]:
        weight = RandomWeight(E3M2, n, k, 0, generator)
        bias = (10 * torch.randn(n, generator=generator)).to(bias_dtype or dtype).cuda()
        x = random_x(600, k, dtype, generator)
        expected = Expected(x, weight, bias)
        for m in (1, 16, 33, 64, 200, 600):
            expected.check(weight.linear(x[:m], bias), f"{dtype} {m} x {n} x {k} with a bias in {bias.dtype}", m)


@pytest.mark.parametrize("activation", [3, 4, 5], ids=["gelu", "relu", "silu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gates_of_adjacent_channels(dtype, activation, generator):
    for n, k, group_size in [(2, 8, 0), (200, 320, 64), (1026, 1024, 0), (4096, 520, 0)]:
        weight = RandomWeight(E3M2, n, k, group_size, generator)
        bias = torch.randn(n, generator=generator).cuda()
        x = random_x(600, k, dtype, generator)
        for m in (1, 16, 33, 64, 200, 600):
            arguments = (x[:m], weight.tiles[dtype], weight.scales, bias, 3, 2, group_size)
            if weight.kernel_name(m) != "sm90":
                with pytest.raises(RuntimeError, match="only the kernel sm90 has gates"):
                    ops.gated_linear(*arguments, activation)
                continue
            gate, up = ops.linear(*arguments).double().unflatten(1, (-1, 2)).unbind(-1)
            act = {3: lambda g: F.gelu(g, approximate="tanh"), 4: F.relu, 5: F.silu}[activation](gate)
            y = ops.gated_linear(*arguments, activation)
            assert y.shape == (m, n // 2) and y.dtype == dtype
            torch.testing.assert_close(y.double(), act * up, rtol=ROUNDING[dtype] * 1.01, atol=1e-4)


def test_gates_say_what_is_wrong(generator):
    weight = RandomWeight(E3M2, 65, 64, 0, generator)
    x = random_x(1, 64, torch.float16, generator)
    with pytest.raises(ValueError, match="even N.*65"):
        ops.gated_linear(x, weight.tiles[x.dtype], weight.scales, None, 3, 2, 0, 5)
    with pytest.raises(ValueError, match="SiLU.*got 6"):
        ops.gated_linear(x, weight.tiles[x.dtype], weight.scales, None, 3, 2, 0, 6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["dequantize", "reference"])
def test_paths_through_dense_weights(name, dtype, generator):
    ops.load("CUDA")
    weight = RandomWeight(E3M2, 300, 520, 0, generator)
    bias = torch.randn(300, generator=generator).cuda()
    x = random_x(40, 520, dtype, generator)
    torch.ops.ds_fp6.select_cuda_kernel(name)
    try:
        assert weight.kernel_name(40) == name
        Expected(x, weight, bias).check(weight.linear(x, bias), name)
    finally:
        torch.ops.ds_fp6.select_cuda_kernel("")


def test_x_of_any_shape_stride_and_alignment(kernel, generator):
    weight = RandomWeight(E3M2, 136, 192, 0, generator)
    flat = torch.randn(1 + 5 * 3 * 192, generator=generator).half().cuda()
    unaligned = flat[1:].view(5, 3, 192)
    expected = Expected(unaligned.reshape(15, 192), weight)
    y = weight.linear(unaligned)
    assert y.shape == (5, 3, 136)
    expected.check(y.view(15, 136), "unaligned x")
    transposed = flat[:-1].view(192, 15).T
    Expected(transposed, weight).check(weight.linear(transposed), "transposed x")
    every_other = flat[:-1].view(15, 192)[::2]
    Expected(every_other, weight).check(weight.linear(every_other), "every other row of x")
    vector = flat[:192]
    assert weight.linear(vector).shape == (136,)
    assert weight.linear(flat[:0].view(0, 192)).shape == (0, 136)
    assert weight.linear(flat[:0].view(3, 0, 192)).shape == (3, 0, 136)


#: Below that, in units of a channel's scale, sums of bf16 activations are no normal numbers in fp32: every kernel
#: multiplies with weights as 2^-20 of their values.
SMALLEST_SUM = 2.0**-126 * 2.0**20
#: Powers of ten of bf16 rows, and the scales' power of two that keeps y in the range of what fp32 can sum.
MAGNITUDES = [([-10, 0, 5, 10], 0), ([-39, -38, -30, -20], 80), ([20, 30, 38], -80)]


@pytest.mark.parametrize("powers, exponent", MAGNITUDES, ids=["usual", "tiny", "huge"])
def test_bf16_tokens_of_any_magnitude(kernel, powers, exponent, generator):
    for n, k in [(200, 1000), (1024, 4096), (136, 1001)]:
        weight = RandomWeight(E3M2, n, k, 0, generator)
        weight.scales *= 2.0**exponent
        weight.values *= 2.0**exponent
        x = random_x(300, k, torch.float64, generator).clamp(-3, 3)
        for i in range(len(x)):
            x[i] *= 10.0 ** powers[i % len(powers)]
        x[7] = 0
        x[11, 5:] *= 1e-7  # a row of outliers
        x[290, k // 2] = 0.0 if exponent else 1e4
        x = x.bfloat16()
        bias = (2.0**exponent * torch.randn(n, generator=generator)).bfloat16().cuda()
        for terms in (None, bias):
            expected = Expected(x, weight, terms)
            expected.allowed += k * SMALLEST_SUM * weight.scales.T
            for m in (1, 8, 16, 30, 64, 90, 128, 300):
                expected.check(weight.linear(x[:m], terms), f"1e{powers}: {m} x {n} x {k}", m)


@pytest.mark.parametrize("n, k", [(200, 4096), (136, 1000), (8192, 4104), (6000, 8192)])
def test_bf16_tokens_that_grow_and_shrink_along_k(n, k, generator):
    weight = RandomWeight(E3M2, n, k, 0, generator)
    x = random_x(16, k, torch.float64, generator)
    along = torch.linspace(0, 1, k, device="cuda", dtype=torch.float64)
    x[0] *= 10 ** (6 * along)
    x[1] *= 10 ** (-6 * along)
    x[2] *= 10 ** (8 * (along - 0.5).abs())
    x[3, : k // 2] = 0
    x[4] *= torch.where(along.mul(40).long() % 9 == 5, 1e4, 1)  # outliers here and there
    x[5] = 0
    x[6, k - 1] = 3e7
    x = x.bfloat16()
    expected = Expected(x, weight)
    for m in (1, 3, 7, 8, 16):
        expected.check(weight.linear(x[:m]), f"{m} x {n} x {k}", m)


def test_bf16_infinities_and_nans_spoil_their_own_tokens_only(kernel, generator):
    weight = RandomWeight(E3M2, 264, 1032, 0, generator)
    x = random_x(140, 1032, torch.bfloat16, generator)
    x[3, 17], x[20, 1031], x[66, 0] = float("inf"), float("nan"), float("-inf")
    spoilt = torch.zeros(140, dtype=torch.bool, device="cuda")
    spoilt[[3, 20, 66]] = True
    expected = Expected(x[~spoilt], weight)
    for m in (8, 16, 32, 64, 70, 140):
        y = weight.linear(x[:m])
        expected.check(y[~spoilt[:m]], f"{m} tokens", int((~spoilt[:m]).sum()))
        wide = x[:m].double() @ weight.values.T
        assert torch.equal(y.isinf(), wide.isinf()) and torch.equal(y.isnan(), wide.isnan()), f"{m} tokens"
        infinite = wide.isinf()
        assert torch.equal(y[infinite].double(), wide[infinite]), f"{m} tokens: signs"


@pytest.mark.parametrize("k", [33000, 70001])
def test_bf16_long_rows(k, generator):
    weight = RandomWeight(E3M2, 70, k, 0, generator)
    x = random_x(40, k, torch.bfloat16, generator)
    x[1, -1], x[2, k // 2] = 1e4, -1e6
    expected = Expected(x, weight)
    for m in (1, 40):
        expected.check(weight.linear(x[:m]), f"{m} x 70 x {k}", m)


def test_bf16_x_of_any_shape_stride_and_alignment(kernel, generator):
    weight = RandomWeight(E3M2, 136, 192, 0, generator)
    flat = torch.randn(1 + 16 * 256, generator=generator).bfloat16().cuda()
    wide = flat[:-1].view(16, 256)
    for what, x in {
        "unaligned": flat[1:].view(16, 256)[:, :192], "columns of wider rows": wide[:, 64:], "odd columns": wide[:, 3:195],
        "every other row": wide[::2, :192], "transposed": flat[: 192 * 16].view(192, 16).T, "one row": wide[5:6, 8:200],
        "the same row": wide[:1, :192].expand(9, 192), "rows of an odd stride": flat[: 15 * 193].view(15, 193)[:, 1:],
    }.items():  # fmt: skip
        Expected(x, weight).check(weight.linear(x), what)
    x = wide[:, :192].view(4, 4, 192)
    assert weight.linear(x).shape == (4, 4, 136)
    Expected(wide[:, :192], weight).check(weight.linear(x).view(16, 136), "three dimensions")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_every_time(kernel, dtype, generator):
    weight = RandomWeight(E3M2, 1024, 8192, 0, generator)
    for m in (1, 16, 64, 256):
        x = random_x(m, 8192, dtype, generator)
        first = weight.linear(x)
        for _ in range(20):
            assert torch.equal(weight.linear(x), first), f"{m} tokens"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_hot_x_reads_single_weights(kernel, dtype, generator):
    weight = RandomWeight(E3M2, 128, 320, 0, generator)
    y = weight.linear(torch.eye(320, dtype=dtype, device="cuda"))
    assert torch.equal(y, weight.values.T.float().to(dtype))


def test_graph_capture_and_replay(kernel, generator):
    weight = RandomWeight(E3M2, 4096, 4096, 0, generator)
    for m, dtype in [(1, torch.float16), (64, torch.float16), (1, torch.bfloat16), (64, torch.bfloat16)]:
        x = random_x(m, 4096, dtype, generator)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = weight.linear(x)
        for _ in range(5):
            x.copy_(random_x(m, 4096, dtype, generator))
            y.fill_(float("nan"))
            graph.replay()
            Expected(x, weight).check(y, f"replay with {m} tokens")


def test_kernels_that_follow_each_other_at_once(kernel, generator):
    """Each reads what the one before wrote, and scratch memory is handed on from call to call."""
    weights = [RandomWeight(E3M2, 1024, 1024, 0, generator) for _ in range(3)]
    for weight in weights:  # y as large as x
        weight.scales *= 6
        weight.values *= 6
    x = random_x(40, 1024, torch.bfloat16, generator)
    inputs, outputs = [x], []
    for i in range(60):
        outputs.append(weights[i % 3].linear(inputs[-1]))
        inputs.append(outputs[-1])
    torch.cuda.synchronize()
    for i, (own_x, y) in enumerate(zip(inputs, outputs)):
        Expected(own_x, weights[i % 3]).check(y, f"link {i}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_streams_at_the_same_time(kernel, dtype, generator):
    weight = RandomWeight(E3M2, 2048, 4096, 0, generator)
    x = [random_x(16, 4096, dtype, generator) for _ in range(4)]
    streams = [torch.cuda.Stream() for _ in x]
    torch.cuda.synchronize()
    results = []
    for _ in range(20):
        for stream, own_x in zip(streams, x):
            with torch.cuda.stream(stream):
                results.append((own_x, weight.linear(own_x)))
    torch.cuda.synchronize()
    for own_x, y in results[-8:] + results[:8]:
        Expected(own_x, weight).check(y, "four streams")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_on_the_device_of_its_tensors(generator):
    weight = RandomWeight(E3M2, 256, 256, 0, generator)
    x = random_x(16, 256, torch.float16, generator)
    y = ops.linear(x.to("cuda:1"), weight.tiles[x.dtype].to("cuda:1"), weight.scales.to("cuda:1"), None, 3, 2, 0)
    assert y.device == torch.device("cuda:1")
    Expected(x, weight).check(y.to("cuda:0"), "second GPU")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torch_compile_traces_through(dtype, generator):
    weight = RandomWeight(E3M2, 128, 128, 0, generator)
    arguments = (random_x(4, 128, dtype, generator), weight.tiles[dtype], weight.scales, None, 3, 2, 0)
    torch.library.opcheck(torch.ops.ds_fp6.linear.default, arguments, test_utils=["test_faketensor"])


#: A message that names both 16-bit types, as C++ or as Python spells them.
NAMES_BOTH_TYPES = r"(?is)(?=.*(\bhalf\b|\bfloat16\b))(?=.*\bbfloat16\b)"


@pytest.mark.parametrize("dtype, other", [DTYPES, DTYPES[::-1]], ids=["fp16", "bf16"])
def test_x_is_of_the_type_that_the_weight_is_laid_out_for(kernel, dtype, other, generator):
    for n, k in [(200, 1096), (65, 127)]:
        weight = RandomWeight(E3M2, n, k, 0, generator)
        packed = PackedWeight(E3M2, 0, k, weight.tiles[dtype], weight.scales)
        assert packed.dtype == dtype
        x, other_x = random_x(300, k, dtype, generator), random_x(300, k, other, generator)
        for m in (1, 64, 300):
            with pytest.raises(TypeError, match=NAMES_BOTH_TYPES):
                ops.linear(other_x[:m], weight.tiles[dtype], weight.scales, None, 3, 2, 0)
            if n % 2 == 0:
                with pytest.raises(TypeError, match=NAMES_BOTH_TYPES):
                    ops.gated_linear(other_x[:m], weight.tiles[dtype], weight.scales, None, 3, 2, 0, 5)
            with pytest.raises(TypeError, match=f"x is {other}, .* for {dtype}; weight.to"):
                packed_linear(other_x[:m], packed)
            Expected(x[:m], weight).check(packed_linear(x[:m], packed), f"{dtype} {m} x {n} x {k} after the errors")
        turned = packed.to(dtype=other)
        Expected(other_x, weight).check(packed_linear(other_x, turned), f"{other} {n} x {k} once it is laid out for it")
    with pytest.raises(TypeError, match="torch.float32"):
        packed_linear(x.float(), packed)
    torch.cuda.synchronize()


@pytest.mark.parametrize("fmt", FEW_FORMATS, ids=str)
def test_a_weight_is_laid_out_for_x_of_another_type_and_back(fmt, generator):
    for n, k, group_size in [(1, 1, 0), (65, 127, 16), (200, 1096, 0)]:
        weight = RandomWeight(fmt, n, k, group_size, generator)
        for dtype, other in (DTYPES, DTYPES[::-1]):
            first = PackedWeight(fmt, group_size, k, weight.tiles[dtype], weight.scales)
            assert first.to(dtype=dtype) is first and first.to(first.device) is first
            turned = first.to(dtype=other)
            assert turned.dtype == other and torch.equal(turned.packed, weight.tiles[other])
            assert torch.equal(turned.to(dtype=dtype).packed, first.packed)
            assert torch.equal(turned.dequantize(), first.dequantize())
            for name, tensor in turned.state_dict().items():
                assert torch.equal(tensor, first.state_dict()[name]), name
            assert torch.equal(first.to("cpu").packed, weight.rows.cpu()) and first.to("cpu").dtype is None
            assert torch.equal(first.to("cpu").to(first.device, dtype).packed, first.packed)
    with pytest.raises(TypeError, match="(?i)float16 or bfloat16"):
        first.to(dtype=torch.float32)


def test_bad_arguments_raise_and_leave_the_context_alive(generator):
    weight = RandomWeight(E3M2, 128, 192, 0, generator)
    x = random_x(4, 192, torch.float16, generator)
    tiles, scales = weight.tiles[x.dtype], weight.scales

    def call(x=x, tiles=tiles, scales=scales, bias=None, e=3, m=2, group_size=0):
        return ops.linear(x, tiles, scales, bias, e, m, group_size)

    with pytest.raises(TypeError, match="float16 or bfloat16 on a GPU, got Float"):
        call(x=x.float())
    with pytest.raises(ValueError, match="tiles of 128 x 191 codes|tiles of 128 x 128 codes"):
        call(x=x[:, :128])
    with pytest.raises(ValueError, match="x is on cpu"):
        call(x=x.cpu())
    with pytest.raises(ValueError, match="scales is on cpu"):
        call(scales=scales.cpu())
    with pytest.raises(TypeError, match="scales must be float32"):
        call(scales=scales.half())
    with pytest.raises(ValueError, match=r"scales must be \[128, 2\]"):
        call(group_size=96)
    with pytest.raises(ValueError, match="tiles of 64 x 192"):
        call(scales=scales[:64])
    with pytest.raises(ValueError, match="group_size"):
        call(group_size=-1)
    with pytest.raises(ValueError, match="exponent_bits 6"):
        call(e=6, m=1)
    with pytest.raises(ValueError, match="codes of 5 bits"):
        call(e=2)
    with pytest.raises(TypeError, match="packed must be uint8"):
        call(tiles=tiles.view(torch.int8))
    with pytest.raises(ValueError, match=r"bias must be \[128\]"):
        call(bias=torch.zeros(127, dtype=torch.float16, device="cuda"))
    with pytest.raises(TypeError, match="bias must be"):
        call(bias=torch.zeros(128, dtype=torch.bfloat16, device="cuda"))
    with pytest.raises(ValueError, match="a CUDA kernel is one of"):
        torch.ops.ds_fp6.select_cuda_kernel("sm10")
    packed = PackedWeight(E3M2, 0, 192, tiles, scales)
    with pytest.raises(ValueError, match=r"x must be \[\.\.\., 192\]"):
        packed_linear(x[:, :100], packed)
    with pytest.raises(ValueError, match="x is on cpu"):
        packed_linear(x.cpu(), packed)
    Expected(x, weight).check(packed_linear(x, packed), "after the errors")
    torch.cuda.synchronize()
