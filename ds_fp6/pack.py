"""Packing: codes of 3 to 8 bits to dense bytes and back.

The canonical layout, which checkpoints and the CPU kernels use, is row-major: row ``n`` is a little-endian bit
stream in which code ``k`` takes bits ``[k·bits, (k+1)·bits)``, padded with zero bits to a whole byte.

    bytes of a row = ceil(K · bits / 8)        exactly `bits` bits a weight, whatever N and K

A GPU's layout is a rearrangement of it into the order in which its threads consume it, and depends on the type of
activations, fp16 or bf16, that the weight is multiplied with (``csrc/common/layout.h``, ``ops.packed_shape``).
"""

from __future__ import annotations

import torch

from ds_fp6 import ops
from ds_fp6.formats import MAX_BITS, MIN_BITS, Format

#: Codes in the smallest run that fills whole bytes at every width: 8 codes take exactly `bits` bytes.
RUN = 8


def row_bytes(in_features: int, bits: int) -> int:
    return -(-in_features * bits // 8)


def _check_bits(bits: int) -> None:
    if not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"bits must lie in {MIN_BITS}..{MAX_BITS}, got {bits}")


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes uint8 [N, K], each below ``2^bits``, to canonical rows uint8 [N, ceil(K·bits/8)].

    Raises ``ValueError`` for codes of another dtype or shape, or out of range.
    """
    _check_bits(bits)
    if codes.dtype != torch.uint8 or codes.dim() != 2:
        raise ValueError(f"codes must be uint8 [N, K], got {codes.dtype} {list(codes.shape)}")
    if codes.numel() and int(codes.max()) >= 2**bits:
        raise ValueError(f"code {int(codes.max())} does not fit in {bits} bits")
    n, k = codes.shape
    runs = torch.nn.functional.pad(codes, (0, -k % RUN)).view(n, -1, RUN)
    # One run as a 64-bit word; at 8 bits the last code reaches the sign bit, which the byte mask drops again.
    words = torch.zeros(runs.shape[:2], dtype=torch.int64, device=codes.device)
    for i in range(RUN):
        words |= runs[:, :, i].long() << (i * bits)
    run_bytes = torch.stack([(words >> (8 * j)) & 0xFF for j in range(bits)], dim=-1)
    return run_bytes.to(torch.uint8).view(n, -1)[:, : row_bytes(k, bits)].contiguous()


def unpack(rows: torch.Tensor, bits: int, in_features: int) -> torch.Tensor:
    """Canonical rows uint8 [N, ceil(K·bits/8)] to codes uint8 [N, K], where K = ``in_features``."""
    _check_bits(bits)
    if rows.dtype != torch.uint8 or rows.dim() != 2 or rows.shape[1] != row_bytes(in_features, bits):
        raise ValueError(
            f"rows of {in_features} codes of {bits} bits are uint8 [N, {row_bytes(in_features, bits)}], "
            f"got {rows.dtype} {list(rows.shape)}"
        )
    n = len(rows)
    run_bytes = torch.nn.functional.pad(rows, (0, -rows.shape[1] % bits)).view(n, -1, bits)
    words = torch.zeros(run_bytes.shape[:2], dtype=torch.int64, device=rows.device)
    for j in range(bits):
        words |= run_bytes[:, :, j].long() << (8 * j)
    codes = torch.stack([(words >> (i * bits)) & (2**bits - 1) for i in range(RUN)], dim=-1)
    return codes.to(torch.uint8).view(n, -1)[:, :in_features].contiguous()


def to_device_layout(rows: torch.Tensor, fmt: Format, in_features: int, dtype: torch.dtype) -> torch.Tensor:
    """Canonical rows, on the device that will compute with them, to that device's own layout for x of ``dtype``.

    Raises ``TypeError`` for another dtype than float16 and bfloat16 on a GPU; a CPU takes any.
    """
    return ops.pack(rows, fmt.exponent_bits, fmt.mantissa_bits, in_features, dtype) if rows.is_cuda else rows


def to_canonical(packed: torch.Tensor, fmt: Format, out_features: int, in_features: int) -> torch.Tensor:
    """A device's own layout, whatever x it is for, to canonical rows on the same device."""
    if not packed.is_cuda:
        return packed
    return ops.unpack(packed, fmt.exponent_bits, fmt.mantissa_bits, out_features, in_features)
