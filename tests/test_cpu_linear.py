"""``linear`` on every instruction set this CPU has, against fp64 on fresh numbers, into memory poisoned with NaN."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch

from cases import CPU_ISAS, GROUP_SIZES, WEIGHT_SHAPES, fresh_generator, use_isa
from ds_fp6 import ops
from ds_fp6.formats import E2M2, E3M2, Format, all_formats
from ds_fp6.pack import pack
from ds_fp6.quantize import dequantize_reference, number_of_groups

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ROWS = [0, 1, 2, 3, 4, 5, 6, 7, 17, 64, 130]

#: A sum of K products in fp32 is off by at most this many units of 2^-24 of the sum of magnitudes, times sqrt(K):
#: random rounding grows with the root, and each scale and bias rounds once more.
SUM_TOLERANCE = 4.0
#: fp16's smallest subnormal step, half of which rounding to it may cost.
HALF_STEP = 2.0**-25


@pytest.fixture(params=CPU_ISAS)
def isa(request):
    yield from use_isa(request.param)


@pytest.fixture
def generator() -> torch.Generator:
    return fresh_generator()


@pytest.fixture
def poisoned():
    """Fresh memory comes filled with NaN, so that an output that is not written shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


class Case:
    """A random weight and the fp64 result of a linear layer with it."""

    def __init__(self, fmt: Format, n: int, k: int, group_size: int, generator: torch.Generator) -> None:
        self.fmt, self.n, self.k, self.group_size, self.generator = fmt, n, k, group_size, generator
        codes = torch.randint(0, 2**fmt.bits, (n, k), dtype=torch.uint8, generator=generator)
        self.scales = (torch.rand((n, number_of_groups(k, group_size)), generator=generator) + 0.1) / fmt.max
        self.packed = pack(codes, fmt.bits)
        self.weight = dequantize_reference(codes, self.scales, fmt, group_size).double()

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        fmt = self.fmt
        return ops.linear(
            x, self.packed, self.scales, bias, fmt.exponent_bits, fmt.mantissa_bits, self.group_size
        )

    def check(self, dtype: torch.dtype, rows: list[int], bias_dtype: torch.dtype | None) -> None:
        x = torch.randn((max(rows), self.k), generator=self.generator).to(dtype)
        bias = None
        expected = x.double() @ self.weight.T
        magnitude = x.double().abs() @ self.weight.abs().T
        if bias_dtype is not None:
            bias = torch.randn(self.n, generator=self.generator).to(bias_dtype)
            expected, magnitude = expected + bias.double(), magnitude + bias.double().abs()
        allowed = SUM_TOLERANCE * math.sqrt(self.k) * 2.0**-24 * magnitude
        allowed += torch.finfo(dtype).eps / 2 * (expected.abs() + allowed) + (HALF_STEP if dtype == torch.half else 0)
        for m in rows:
            actual = self.linear(x[:m], bias)
            assert actual.shape == (m, self.n) and actual.dtype == dtype
            wrong = (~((actual.double() - expected[:m]).abs() <= allowed[:m])).nonzero()
            if len(wrong):
                i, j = wrong[0].tolist()
                pytest.fail(
                    f"{self.fmt}, N {self.n}, K {self.k}, groups of {self.group_size}, x {dtype}, M {m}, bias "
                    f"{bias_dtype}: {len(wrong)} wrong, first y[{i}, {j}] = {actual[i, j].item():.9g}, fp64 gives "
                    f"{expected[i, j].item():.9g}, allowed {allowed[i, j].item():.3g}"
                )


@pytest.mark.parametrize("fmt", all_formats(), ids=str)
def test_every_format(isa, fmt, generator, poisoned):
    """Every other shape, so that every format meets every dtype, several group sizes, and odd N and K."""
    for i, (n, k) in list(enumerate(WEIGHT_SHAPES))[fmt.bits % 2 :: 2]:
        case = Case(fmt, n, k, GROUP_SIZES[(i + fmt.bits) % len(GROUP_SIZES)], generator)
        dtype = DTYPES[(i + fmt.exponent_bits) % 3]
        case.check(dtype, [1, 3, 17], (None, dtype, torch.float32)[i % 3])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fmt", [E3M2, E2M2], ids=str)
def test_fast_formats_in_every_shape(isa, fmt, dtype, generator, poisoned):
    for i, (n, k) in enumerate(WEIGHT_SHAPES):
        bias = (None, dtype, torch.float32)[i % 3]
        Case(fmt, n, k, 0, generator).check(dtype, ROWS, bias)
        Case(fmt, n, k, GROUP_SIZES[i % len(GROUP_SIZES)], generator).check(dtype, [1, 4, 19], bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_rows_are_cut_into_several_tasks(isa, dtype, generator, poisoned):
    Case(E3M2, 70, 100, 0, generator).check(dtype, [1100], None)


def test_many_columns_are_fetched_in_pieces(isa, generator, poisoned):
    Case(E3M2, 3001, 257, 0, generator).check(torch.bfloat16, [2, 50], None)


def test_threads_do_not_change_a_bit(isa, generator):
    case = Case(E3M2, 500, 321, 64, generator)
    threads = torch.get_num_threads()
    for m in (1, 60):
        x = torch.randn((m, 321), generator=generator).bfloat16()
        together = case.linear(x, None)
        torch.set_num_threads(1)
        try:
            assert torch.equal(case.linear(x, None), together)
        finally:
            torch.set_num_threads(threads)


def test_extra_dimensions_and_strides(generator):
    case = Case(E3M2, 20, 130, 0, generator)
    x = torch.randn((2, 3, 130), generator=generator)
    flat = case.linear(x.view(6, 130), None)
    assert torch.equal(case.linear(x, None), flat.view(2, 3, 20))
    assert torch.equal(case.linear(x[0, 0], None), case.linear(x[0, :1], None)[0])
    assert case.linear(x[:, :0], None).shape == (2, 0, 20)
    transposed = x.view(6, 130).t().contiguous().t()
    assert torch.equal(case.linear(transposed, None), flat)
    padded = torch.zeros(20, case.packed.shape[1] + 5, dtype=torch.uint8)
    padded[:, :-5] = case.packed
    case.packed = padded[:, :-5]
    assert torch.equal(case.linear(x, None), flat.view(2, 3, 20))


def test_weights_at_the_end_of_memory(isa, generator):
    """A kernel that reads beyond the last byte of a row sees garbage codes there; none of it may reach y."""
    for k in (1, 5, 63, 65, 127):
        case = Case(E3M2, 5, k, 0, generator)
        buffer = torch.full((case.packed.numel() + 64,), 0xFF, dtype=torch.uint8)
        buffer[: case.packed.numel()] = case.packed.flatten()
        case.packed = buffer[: case.packed.numel()].view(case.packed.shape)
        case.check(torch.float32, [1, 9], None)


def test_nan_and_infinity_in_x_stay_in_their_row(isa, generator):
    case = Case(E3M2, 40, 100, 0, generator)
    for m in (3, 20):
        x = torch.randn((m, 100), generator=generator).bfloat16()
        x[1, 7] = float("nan")
        y = case.linear(x, None)
        assert y[1].isnan().all()
        assert y[0].isfinite().all() and y[2:].isfinite().all()


def test_scales_of_any_size(isa, generator):
    """Powers of two that a kernel moves between weights and scales must not overflow."""
    for power in (-100, 100):
        case = Case(E3M2, 9, 64, 0, generator)
        case.scales *= 2.0**power
        case.weight *= 2.0**power
        case.check(torch.float32, [1, 8], None)
        case.check(torch.bfloat16, [1, 8], None)


def test_bad_arguments_carry_their_values():
    packed, scales, x = torch.zeros(4, 6, dtype=torch.uint8), torch.ones(4, 1), torch.ones(2, 8)
    with pytest.raises(TypeError, match="[Dd]ouble"):
        ops.linear(x.double(), packed, scales, None, 3, 2, 0)
    with pytest.raises(ValueError, match=r"16.*\[4, 12\].*\[4, 6\]"):
        ops.linear(torch.ones(2, 16), packed, scales, None, 3, 2, 0)
    with pytest.raises(ValueError, match=r"\[5, 6\].*\[4, 6\]"):
        ops.linear(x, packed, torch.ones(5, 1), None, 3, 2, 0)
    with pytest.raises(ValueError, match=r"groups of 4 must be \[N, 2\], got \[4, 1\]"):
        ops.linear(x, packed, scales, None, 3, 2, 4)
    with pytest.raises(ValueError, match="group_size .* got -1"):
        ops.linear(x, packed, scales, None, 3, 2, -1)
    with pytest.raises(ValueError, match="got exponent_bits 3 and mantissa_bits 9"):
        ops.linear(x, packed, scales, None, 3, 9, 0)
    with pytest.raises(TypeError, match="packed must be uint8, got Int"):
        ops.linear(x, packed.int(), scales, None, 3, 2, 0)
    with pytest.raises(TypeError, match="scales must be float32, got Half"):
        ops.linear(x, packed, scales.half(), None, 3, 2, 0)
    with pytest.raises(ValueError, match=r"bias must be \[4\], got \[5\]"):
        ops.linear(x, packed, scales, torch.ones(5), 3, 2, 0)
    with pytest.raises(TypeError, match="bias must be Float as x or float32, got Half"):
        ops.linear(x, packed, scales, torch.ones(4).half(), 3, 2, 0)
    with pytest.raises(ValueError, match="scalar"):
        ops.linear(torch.tensor(1.0), packed, scales, None, 3, 2, 0)


def _environment(isa: str) -> subprocess.CompletedProcess:
    program = (
        "import torch; from ds_fp6 import ops; x = torch.ones(1, 8);"
        "print(ops.linear(x, torch.zeros(4, 6, dtype=torch.uint8), torch.ones(4, 1), None, 3, 2, 0).tolist());"
        "print(torch.ops.ds_fp6.cpu_isa())"
    )
    environment = {**os.environ, "DS_FP6_CPU_ISA": isa}
    return subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300)


def test_environment_variable_forces_the_kernels():
    done = _environment("generic")
    assert done.returncode == 0, done.stderr
    assert "generic: " in done.stdout


def test_unknown_kernels_in_the_environment_are_refused_with_a_list():
    done = _environment("avx1024")
    assert done.returncode != 0
    assert 'DS_FP6_CPU_ISA is "avx1024"; this CPU runs: ' in done.stderr and "generic" in done.stderr


def test_unknown_kernels_by_name_are_refused_with_a_list():
    ops.load("CPU")
    with pytest.raises(ValueError, match="avx3.*this CPU runs: .*generic"):
        torch.ops.ds_fp6.select_cpu_isa("avx3")


def test_compile_traces_through():
    """The fakes give the shapes and dtypes that the kernels give."""
    w = torch.randn(6, 10)
    torch.library.opcheck(torch.ops.ds_fp6.quantize.default, (w, 3, 2, 4), test_utils="test_faketensor")
    packed, scales = ops.quantize(w, 3, 2, 4)
    x = torch.randn(2, 3, 10).bfloat16()
    torch.library.opcheck(
        torch.ops.ds_fp6.linear.default, (x, packed, scales, None, 3, 2, 4), test_utils="test_faketensor"
    )
    torch.library.opcheck(
        torch.ops.ds_fp6.dequantize.default, (packed, scales, 3, 2, 4, 10, torch.half), test_utils="test_faketensor"
    )
