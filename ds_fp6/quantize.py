"""Quantization: dense weights to codes and scales.

``quantize_reference`` is the definition, in plain torch; ``quantize`` is the fused kernel of the weight's
device, bit-exact with it. The rounding is that of qtorch's ``float_quantize(x, e, m, rounding="nearest")``.
"""

from __future__ import annotations

import torch

from ds_fp6 import ops
from ds_fp6.formats import Format

#: Scales are kept out of fp32's subnormals, whose few bits would lose what the division by them must keep.
SMALLEST_SCALE = torch.finfo(torch.float32).tiny

WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def number_of_groups(in_features: int, group_size: int) -> int:
    """Scales in a row: 1 without groups (``group_size`` 0), else ``ceil(in_features / group_size)``."""
    return -(-in_features // group_size) if group_size else 1


def encode(t: torch.Tensor, fmt: Format) -> torch.Tensor:
    """The code of the value of ``fmt`` nearest to each finite number of ``t``.

    Ties go away from zero, magnitudes beyond ``fmt.max`` saturate, and what rounds to zero is code 0
    (never -0); subnormals are kept. ``t``: fp32 of any shape; returns uint8 of the same shape.
    """
    magnitude = t.abs()
    lowest, highest = 1 - fmt.bias, 2 ** (fmt.exponent_bits - 1)
    exponent = (torch.frexp(magnitude).exponent - 1).clamp(lowest, highest).masked_fill(magnitude == 0, lowest)
    # In units of the spacing at that exponent; exact, because the spacing is a power of two. The cut is far
    # beyond the largest mantissa, so it only keeps huge magnitudes inside an integer's range.
    units = torch.ldexp(magnitude, fmt.mantissa_bits - exponent).clamp(max=2.0 ** (fmt.mantissa_bits + 2))
    whole = units.floor()
    rounded = (whole + (units - whole >= 0.5)).to(torch.int32)
    # A mantissa that rounds up to the next power of two carries into the exponent by itself.
    code = ((exponent + fmt.bias) << fmt.mantissa_bits) + rounded - (1 << fmt.mantissa_bits)
    code = code.clamp(max=2 ** (fmt.bits - 1) - 1)
    negative = torch.signbit(t) & (code > 0)
    return (code | (negative.to(torch.int32) << (fmt.bits - 1))).to(torch.uint8)


def decode(codes: torch.Tensor, fmt: Format) -> torch.Tensor:
    """The value of each code, exact in fp32. ``codes``: uint8 of any shape."""
    return torch.tensor(fmt.values, dtype=torch.float32, device=codes.device)[codes.long()]


def expand_scales(scales: torch.Tensor, in_features: int, group_size: int) -> torch.Tensor:
    """Scales [N, G] as they apply to each weight, [N, K]."""
    if not group_size:
        return scales.expand(-1, in_features)
    return scales.repeat_interleave(group_size, dim=1)[:, :in_features]


def compute_scales(weight: torch.Tensor, fmt: Format, group_size: int = 0) -> torch.Tensor:
    """``max|w| / fmt.max`` of each row, or of each group of ``group_size`` along K (the last may be shorter).

    fp32 [N, G] from [N, K]; 1 where all weights are zero, and never below the smallest normal fp32.
    """
    magnitude = weight.float().abs()
    if group_size:
        groups = number_of_groups(weight.shape[1], group_size)
        magnitude = torch.nn.functional.pad(magnitude, (0, groups * group_size - weight.shape[1]))
        magnitude = magnitude.view(len(weight), groups, group_size)
    largest = magnitude.amax(dim=-1).view(len(weight), -1)
    scales = (largest / fmt.max).clamp(min=SMALLEST_SCALE)
    return torch.where(largest == 0, torch.ones_like(scales), scales)


def check_weight(weight: torch.Tensor, fmt: Format, group_size: int, scales: torch.Tensor | None = None) -> None:
    """Raises ``TypeError`` or ``ValueError`` for what cannot be quantized, NaN and infinity excepted."""
    if weight.dtype not in WEIGHT_DTYPES:
        raise TypeError(f"a weight to quantize is fp32, fp16 or bf16, got {weight.dtype}")
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(f"a weight to quantize is [N, K] with N, K >= 1, got {list(weight.shape)}")
    if group_size < 0:
        raise ValueError(f"group_size must be 0 (one scale a row) or positive, got {group_size}")
    expected = (weight.shape[0], number_of_groups(weight.shape[1], group_size))
    if scales is not None and (scales.dtype != torch.float32 or tuple(scales.shape) != expected):
        raise ValueError(f"scales must be float32 {list(expected)}, got {scales.dtype} {list(scales.shape)}")
    if scales is not None:
        bad = (~(torch.isfinite(scales) & (scales > 0))).nonzero()
        if len(bad):
            row, group = bad[0].tolist()
            raise ValueError(f"scales[{row}, {group}] is {scales[row, group].item()}; scales are finite and positive")


def check_finite(weight: torch.Tensor) -> None:
    """Raises ``ValueError`` that names the first NaN or infinity by row and column."""
    bad = (~torch.isfinite(weight)).nonzero()
    if len(bad):
        row, column = bad[0].tolist()
        raise ValueError(f"weight[{row}, {column}] is {weight[row, column].item()}; only finite weights quantize")


def quantize_reference(
    weight: torch.Tensor, fmt: Format, group_size: int = 0, scales: torch.Tensor | None = None,
    backend: str = "torch",
) -> tuple[torch.Tensor, torch.Tensor]:
    """``codes = nearest(w / scale)``, the definition that the fused kernels are held to.

    Args:
        weight: [N, K] fp32, fp16 or bf16.
        fmt: the format of the codes.
        group_size: weights along K that share a scale; 0 is the whole row.
        scales: fp32 [N, G]; computed by ``compute_scales`` unless given (a tensor-parallel shard takes the
            scale of the full row).
        backend: ``"torch"``, or ``"qtorch"`` to round with that library, which compiles itself on import.

    Returns: codes uint8 [N, K] and scales fp32 [N, G].
    Raises: ``TypeError``, ``ValueError`` on a wrong dtype, shape, group size or a weight that is not finite.
    """
    check_weight(weight, fmt, group_size, scales)
    check_finite(weight)
    if scales is None:
        scales = compute_scales(weight, fmt, group_size)
    scaled = weight.float() / expand_scales(scales, weight.shape[1], group_size)
    if backend == "qtorch":
        from qtorch.quant import float_quantize

        scaled = float_quantize(scaled.contiguous(), exp=fmt.exponent_bits, man=fmt.mantissa_bits, rounding="nearest")
    elif backend != "torch":
        raise ValueError(f"backend must be 'torch' or 'qtorch', got {backend!r}")
    return encode(scaled, fmt), scales


def dequantize_reference(codes: torch.Tensor, scales: torch.Tensor, fmt: Format, group_size: int = 0) -> torch.Tensor:
    """``value(code) · scale`` in fp32: codes uint8 [N, K], scales fp32 [N, G] → fp32 [N, K]."""
    return decode(codes, fmt) * expand_scales(scales, codes.shape[1], group_size)


def quantize(
    weight: torch.Tensor, fmt: Format, group_size: int = 0, scales: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``quantize_reference`` and packing in one kernel of the weight's device: packed uint8, scales fp32 [N, G].

    The packed layout is the device's (``pack.py``), a GPU's for x of ``dtype``, float16 or bfloat16; None is the
    weight's own, float16 for an fp32 weight. Otherwise same arguments and errors as ``quantize_reference``.
    """
    check_weight(weight, fmt, group_size, scales)
    return ops.quantize(weight, fmt.exponent_bits, fmt.mantissa_bits, group_size, scales, dtype)
