"""What the CUDA tests share: packed weights of random codes, and a check of the linear layer against fp64."""

from __future__ import annotations

import pytest
import torch

from ds_fp6 import ops
from ds_fp6.formats import Format
from ds_fp6.pack import pack
from ds_fp6.quantize import decode, expand_scales, number_of_groups

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0),
    reason="no CUDA GPU of compute capability 8.0 or newer",
)

#: Rounding of y, relative to y; and of fp32 sums, relative to the sum of magnitudes.
ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SUMMATION = 1e-5


class RandomWeight:
    """Packed weight of uniformly random codes, N × K, with its exact values.

    ``tiles`` are the codes as they are laid out for x of either type, all made here: a call of ``linear`` may be
    captured in a graph, or run beside others on a stream of its own.
    """

    def __init__(self, fmt: Format, n: int, k: int, group_size: int, generator: torch.Generator) -> None:
        self.fmt, self.group_size, self.shape = fmt, group_size, (n, k)
        on_gpu = _generator_on_gpu(generator)
        self.codes = torch.randint(0, 2**fmt.bits, (n, k), generator=on_gpu, dtype=torch.uint8, device="cuda")
        self.rows = pack(self.codes, fmt.bits)
        uniform = torch.rand((n, number_of_groups(k, group_size)), generator=on_gpu, device="cuda")
        self.scales = torch.exp2(4 * uniform - 8) / fmt.max
        self.tiles = {
            dtype: ops.pack(self.rows, fmt.exponent_bits, fmt.mantissa_bits, k, dtype) for dtype in ops.LAYOUT_DTYPES
        }
        self.values = (decode(self.codes, fmt).double() * expand_scales(self.scales, k, group_size).double())

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        poison(x.shape[:-1].numel() * self.shape[0], x.dtype)
        fmt = self.fmt
        return ops.linear(
            x, self.tiles[x.dtype], self.scales, bias, fmt.exponent_bits, fmt.mantissa_bits, self.group_size
        )

    def kernel_name(self, m: int) -> str:
        """The kernel that ``linear`` takes for ``m`` tokens."""
        fmt = self.fmt
        return torch.ops.ds_fp6.cuda_kernel_name(
            m, *self.shape, fmt.exponent_bits, fmt.mantissa_bits, self.group_size, self.rows.device
        )


def _generator_on_gpu(generator: torch.Generator) -> torch.Generator:
    seed = int(torch.randint(0, 2**62, (), generator=generator))
    return torch.Generator("cuda").manual_seed(seed)


def poison(elements: int, dtype: torch.dtype) -> None:
    """Fills the memory that the allocator will hand out next for so many elements with NaN."""
    torch.full((elements,), float("nan"), dtype=dtype, device="cuda")


def random_x(m: int, k: int, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    return torch.randn((m, k), generator=_generator_on_gpu(generator), device="cuda").to(dtype)


class Expected:
    """``y = x · Wᵀ + bias`` in fp64, and how far each element may be off.

    The kernel that turns weights into 16 bits and hands them to cuBLAS rounds the scaled weights, the small ones to
    subnormals; the others round nothing but y.
    """

    def __init__(self, x: torch.Tensor, weight: RandomWeight, bias: torch.Tensor | None = None) -> None:
        wide = x.double()
        self.y = wide @ weight.values.T
        # Magnitudes need no precision.
        magnitudes = (x.abs().float() @ weight.values.abs().float().T).double()
        if bias is not None:
            self.y += bias.double()
            magnitudes += bias.abs().double()
        smallest = torch.finfo(x.dtype).smallest_normal
        self.allowed = ROUNDING[x.dtype] * (self.y.abs() + smallest) + SUMMATION * magnitudes
        # cuBLAS's y is rounded before the bias is added, and once more after it.
        self.allowed_dequantized = self.allowed + ROUNDING[x.dtype] * (
            2 * magnitudes + smallest * x.abs().double().sum(dim=1, keepdim=True)
        )
        self.weight = weight

    def check(self, y: torch.Tensor, what: str, m: int | None = None) -> None:
        m = len(self.y) if m is None else m
        assert y.shape == self.y[:m].shape, f"{what}: shape {list(y.shape)}"
        dequantized = m > 0 and self.weight.kernel_name(m) == "dequantize"
        allowed = self.allowed_dequantized if dequantized else self.allowed
        bad = ~((y.double() - self.y[:m]).abs() <= allowed[:m])  # NaN is bad
        if bool(bad.any()):
            at = tuple(bad.nonzero()[0].tolist())
            pytest.fail(f"{what}: {int(bad.sum())} wrong, first y{list(at)} = {y[at].item()}, not {self.y[at].item()}")
