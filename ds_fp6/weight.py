"""``PackedWeight``: a quantized weight matrix that multiplies, dequantizes and serializes itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ds_fp6 import ops
from ds_fp6.formats import Format, Mode
from ds_fp6.pack import to_canonical, to_device_layout
from ds_fp6.quantize import number_of_groups, quantize


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A weight ``W[N, K] = value(code) · scale`` of which only packed codes and scales are kept.

    Attributes:
        format: the codes' number format.
        group_size: weights along K that share a scale; 0 is one scale per output channel.
        in_features: K.
        packed: uint8, the codes in their device's layout (``pack.py``), on a GPU one for x of ``dtype``.
        scales: fp32 [N, G], G = 1 or ceil(K / group_size).
    """

    format: Format
    group_size: int
    in_features: int
    packed: torch.Tensor
    scales: torch.Tensor

    def __post_init__(self) -> None:
        n, groups = self.scales.shape[0], number_of_groups(self.in_features, self.group_size)
        of_dtypes = (
            ops.packed_shape(self.packed.device, self.format.bits, n, self.in_features, dtype)
            for dtype in ops.LAYOUT_DTYPES
        )
        expected = list(dict.fromkeys(of_dtypes))  # on a GPU two, on a CPU one
        if self.scales.dtype != torch.float32 or tuple(self.scales.shape) != (n, groups):
            raise ValueError(
                f"scales of K = {self.in_features} in groups of {self.group_size} are float32 [N, {groups}], "
                f"got {self.scales.dtype} {list(self.scales.shape)}"
            )
        if self.packed.dtype != torch.uint8 or tuple(self.packed.shape) not in expected:
            shapes = " or ".join(str(list(shape)) for shape in expected)
            raise ValueError(
                f"{self.format} codes of [{n}, {self.in_features}] are packed as uint8 {shapes} on "
                f"{self.packed.device}, got {self.packed.dtype} {list(self.packed.shape)}"
            )
        if self.packed.device != self.scales.device:
            raise ValueError(f"packed codes are on {self.packed.device}, their scales on {self.scales.device}")

    @classmethod
    def from_dense(
        cls, weight: torch.Tensor, mode: str | Mode | Format, scales: torch.Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> PackedWeight:
        """Quantizes ``weight`` [N, K] (fp32, fp16 or bf16) on its device.

        ``mode`` is a quantization mode such as ``"wf6af16g128"`` or a ``Format``; ``scales`` fp32 [N, G]
        replaces the computed ones. ``dtype``, float16 or bfloat16, is the type of x that a GPU lays the codes out
        for; None is the mode's 16-bit type, else the weight's own, else float16. Raises ``ValueError`` that names row
        and column of a NaN or infinity.
        """
        mode = Mode(mode) if isinstance(mode, Format) else Mode.parse(mode)
        if dtype is None:
            dtype = _layout_dtype(mode, weight)
        fmt, group_size = mode.format, mode.group_size
        packed, scales = quantize(weight, fmt, group_size, scales, dtype)
        return cls(fmt, group_size, weight.shape[1], packed, scales)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.scales.shape[0], self.in_features

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def dtype(self) -> torch.dtype | None:
        """The type of x that a GPU's layout is for, float16 or bfloat16; None on the CPU, whose layout serves any."""
        return ops.layout_dtype(self.packed)

    @property
    def nbytes(self) -> int:
        """Bytes that the weight takes: packed codes and scales."""
        return self.packed.nbytes + self.scales.nbytes

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """``value(code) · scale``, [N, K], computed in fp32 and rounded once to ``dtype``."""
        fmt = self.format
        return ops.dequantize(
            self.packed, self.scales, fmt.exponent_bits, fmt.mantissa_bits, self.group_size, self.in_features, dtype
        )

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """``y = x · Wᵀ (+ bias)``, see ``ds_fp6.linear``."""
        return linear(x, self, bias)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> PackedWeight:
        """The same codes and scales on another device, in that device's layout, or laid out for x of another type.

        ``device`` None is the weight's own. ``dtype``, float16 or bfloat16, matters on a GPU; None keeps what the
        weight is laid out for, and is float16 for one that comes from the CPU.
        """
        device = self.device if device is None else torch.device(device)
        dtype = self.dtype if dtype is None else dtype
        if device == self.device and self.dtype in (None, dtype):
            return self
        state = {name: tensor.to(device) for name, tensor in self.state_dict().items()}
        return self.from_state_dict(state, dtype)

    @property
    def header(self) -> torch.Tensor:
        """What the tensors do not say: int64 [4] on the CPU, exponent bits, mantissa bits, group size, K."""
        return torch.tensor([self.format.exponent_bits, self.format.mantissa_bits, self.group_size, self.in_features])

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Three tensors: ``packed`` in the canonical layout whatever device and x, ``scales``, and ``header``."""
        packed = to_canonical(self.packed, self.format, *self.shape)
        return {"packed": packed, "scales": self.scales, "header": self.header}

    @classmethod
    def from_state_dict(cls, state: dict[str, torch.Tensor], dtype: torch.dtype | None = None) -> PackedWeight:
        """The inverse of ``state_dict``; the weight lands on the device of ``state["packed"]``.

        ``dtype``, float16 or bfloat16, is the type of x that a GPU lays it out for; None is float16.
        """
        missing = {"packed", "scales", "header"} - state.keys()
        if missing:
            raise ValueError(f"a packed weight's state lacks {sorted(missing)}; it has {sorted(state)}")
        exponent_bits, mantissa_bits, group_size, in_features = state["header"].tolist()
        fmt = Format(exponent_bits, mantissa_bits)
        packed = to_device_layout(state["packed"], fmt, in_features, dtype or torch.float16)
        return cls(fmt, group_size, in_features, packed, state["scales"])


def _layout_dtype(mode: Mode, weight: torch.Tensor) -> torch.dtype:
    """The mode's 16-bit type of activations, else the weight's own 16-bit type, else float16."""
    named = getattr(torch, mode.activation) if mode.activation else None
    return next(dtype for dtype in (named, weight.dtype, torch.float16) if dtype in ops.LAYOUT_DTYPES)


def linear(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``y = x · Wᵀ (+ bias)`` with a packed weight.

    Products of ``x`` with the codes' exact values are accumulated in fp32; scale and bias are applied in fp32
    and the result is rounded once to x's dtype. With bf16 on a GPU sums below 2^-106 of a channel's scale lose
    bits, as fp32's below 2^-126 do.

    Args:
        x: [..., K], fp32 (CPU), fp16 or bf16, on the weight's device; on a GPU of the weight's ``dtype``.
        weight: N × K.
        bias: [N] of x's dtype or fp32, or None.

    Returns: [..., N] of x's dtype. Not differentiable; ``torch.compile`` traces through it.
    Raises: ``ValueError`` or ``TypeError`` with the offending shape, dtype or device.
    """
    if x.dim() == 0 or x.shape[-1] != weight.in_features:
        raise ValueError(f"x must be [..., {weight.in_features}], got {list(x.shape)}")
    if x.device != weight.device:
        raise ValueError(f"x is on {x.device}, the packed weight on {weight.device}")
    if weight.dtype not in (None, x.dtype):
        raise TypeError(
            f"x is {x.dtype}, the packed weight is laid out for {weight.dtype}; "
            "weight.to(dtype=x.dtype) lays it out for x of float16 or bfloat16"
        )
    fmt = weight.format
    return ops.linear(x, weight.packed, weight.scales, bias, fmt.exponent_bits, fmt.mantissa_bits, weight.group_size)
