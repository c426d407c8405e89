"""The torch operators ``torch.ops.ds_fp6.*``: schemas, fakes, and the extensions that implement them.

The compiled extensions register their kernels with torch's dispatcher when they are loaded, so a call goes from
Python straight to C++. Loading may compile, so it waits for the first call on a device: until then a stub
stands in the dispatcher, loads the extension, and hands the call on.
"""

from __future__ import annotations

import functools
import threading
from typing import Any

import torch

from ds_fp6.formats import Format

_schemas = torch.library.Library("ds_fp6", "DEF")
# On a GPU `dtype` is the type of the x that the codes are laid out for: float16 or bfloat16; None is w's own, float16
# for a float32 w. A CPU's layout is the same for any.
_schemas.define(
    "quantize(Tensor w, int exponent_bits, int mantissa_bits, int group_size, Tensor? scales=None, "
    "ScalarType? dtype=None) -> (Tensor, Tensor)"
)
_schemas.define(
    "dequantize(Tensor packed, Tensor scales, int exponent_bits, int mantissa_bits, int group_size, "
    "int in_features, ScalarType dtype) -> Tensor"
)
_schemas.define(
    "linear(Tensor x, Tensor packed, Tensor scales, Tensor? bias, int exponent_bits, int mantissa_bits, "
    "int group_size) -> Tensor"
)
# What the kernel of which cuda_kernel_name says "sm90" does besides: out of N channels, gates and values by turns, come
# N / 2; `activation` is DeepSpeed's number, 3 GELU (tanh), 4 ReLU, 5 SiLU.
_schemas.define(
    "gated_linear(Tensor x, Tensor packed, Tensor scales, Tensor? bias, int exponent_bits, int mantissa_bits, "
    "int group_size, int activation) -> Tensor"
)
_schemas.define("pack(Tensor rows, int exponent_bits, int mantissa_bits, int in_features, ScalarType dtype) -> Tensor")
_schemas.define(
    "unpack(Tensor tiles, int exponent_bits, int mantissa_bits, int out_features, int in_features) -> Tensor"
)

#: Operators by the dispatch key of the extension that has them.
_OPERATORS = {
    "CPU": ("quantize", "dequantize", "linear"),
    "CUDA": ("quantize", "dequantize", "linear", "gated_linear", "pack", "unpack"),
}

#: Types of x that a GPU has layouts for.
LAYOUT_DTYPES = (torch.float16, torch.bfloat16)
#: Rows (N) and columns (K) of the GPU layouts' panels, and the blocks of rows in one, see csrc/common/layout.h.
PANEL_ROWS, PANEL_COLUMNS, PANEL_BLOCKS = 64, 64, 4

_lock = threading.RLock()
_stubs: dict[str, torch.library.Library] = {}


@functools.cache
def load(key: str) -> None:
    """Loads, and where needed builds, the extension for dispatch key ``"CPU"`` or ``"CUDA"``.

    Raises ``RuntimeError`` that says what is missing where it cannot be built.
    """
    with _lock:
        _remove_stub(key)
        try:
            builder(key).load(verbose=False)
        except BaseException:
            _install_stub(key)
            raise


def builder(key: str) -> Any:
    """The op builder of the extension for dispatch key ``"CPU"`` or ``"CUDA"``."""
    from ds_fp6.op_builder import CPUBuilder, CUDABuilder

    return {"CPU": CPUBuilder, "CUDA": CUDABuilder}[key]()


def _install_stub(key: str) -> None:
    def stub(name: str):
        def load_and_redispatch(*args: Any, **kwargs: Any) -> Any:
            load(key)
            return getattr(torch.ops.ds_fp6, name)(*args, **kwargs)

        return load_and_redispatch

    library = torch.library.Library("ds_fp6", "IMPL")
    for name in _OPERATORS[key]:
        library.impl(name, stub(name), key)
    _stubs[key] = library


def _remove_stub(key: str) -> None:
    stub = _stubs.pop(key, None)
    if stub is not None:
        stub._destroy()


for _key in _OPERATORS:
    _install_stub(_key)

quantize = torch.ops.ds_fp6.quantize
dequantize = torch.ops.ds_fp6.dequantize
linear = torch.ops.ds_fp6.linear
gated_linear = torch.ops.ds_fp6.gated_linear
pack = torch.ops.ds_fp6.pack
unpack = torch.ops.ds_fp6.unpack


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def cuda_kernel_name(
    m: int, n: int, k: int, exponent_bits: int, mantissa_bits: int, group_size: int, device: torch.device
) -> str:
    """The kernel that ``linear`` takes on ``device`` for x [m, k] and weights [n, k]: sm90, sm80 or dequantize."""
    load("CUDA")
    return torch.ops.ds_fp6.cuda_kernel_name(m, n, k, exponent_bits, mantissa_bits, group_size, device)


def packed_shape(
    device: torch.device, bits: int, out_features: int, in_features: int, dtype: torch.dtype
) -> tuple[int, ...]:
    """The shape of the packed uint8 tensor of an [N, K] weight on ``device`` that x of ``dtype`` is multiplied with.

    [N, ceil(K·bits/8)] on a CPU, for any dtype. A GPU's layout is another for each, and its shape says which:
    [ceil(N/64), ceil(K/64), 512·bits] for float16, [ceil(N/64), ceil(K/64), 4, 128·bits] for bfloat16.
    Raises ``TypeError`` for another dtype on a GPU.
    """
    if device.type != "cuda":
        return out_features, _ceil_div(in_features * bits, 8)
    if dtype not in LAYOUT_DTYPES:
        raise TypeError(f"a GPU's packed codes are laid out for x of float16 or bfloat16, got {dtype}")
    panel_bytes = PANEL_ROWS * PANEL_COLUMNS * bits // 8
    of_panel = (panel_bytes,) if dtype == torch.float16 else (PANEL_BLOCKS, panel_bytes // PANEL_BLOCKS)
    return _ceil_div(out_features, PANEL_ROWS), _ceil_div(in_features, PANEL_COLUMNS), *of_panel


def layout_dtype(packed: torch.Tensor) -> torch.dtype | None:
    """The type of x that packed codes are laid out for, by their dimensions; None on a CPU, whose layout serves any."""
    if packed.device.type != "cuda":
        return None
    return torch.bfloat16 if packed.dim() == 4 else torch.float16


@torch.library.register_fake("ds_fp6::quantize")
def _(w, exponent_bits, mantissa_bits, group_size, scales=None, dtype=None):
    n, k = w.shape
    bits = Format(exponent_bits, mantissa_bits).bits
    dtype = dtype or (w.dtype if w.dtype in LAYOUT_DTYPES else torch.float16)
    packed = w.new_empty(packed_shape(w.device, bits, n, k, dtype), dtype=torch.uint8)
    return packed, w.new_empty((n, _ceil_div(k, group_size) if group_size else 1), dtype=torch.float32)


@torch.library.register_fake("ds_fp6::dequantize")
def _(packed, scales, exponent_bits, mantissa_bits, group_size, in_features, dtype):
    return scales.new_empty((scales.shape[0], in_features), dtype=dtype)


@torch.library.register_fake("ds_fp6::linear")
def _(x, packed, scales, bias, exponent_bits, mantissa_bits, group_size):
    return x.new_empty((*x.shape[:-1], scales.shape[0]))


@torch.library.register_fake("ds_fp6::gated_linear")
def _(x, packed, scales, bias, exponent_bits, mantissa_bits, group_size, activation):
    return x.new_empty((*x.shape[:-1], scales.shape[0] // 2))


@torch.library.register_fake("ds_fp6::pack")
def _(rows, exponent_bits, mantissa_bits, in_features, dtype):
    bits = Format(exponent_bits, mantissa_bits).bits
    return rows.new_empty(packed_shape(rows.device, bits, rows.shape[0], in_features, dtype))


@torch.library.register_fake("ds_fp6::unpack")
def _(tiles, exponent_bits, mantissa_bits, out_features, in_features):
    bits = Format(exponent_bits, mantissa_bits).bits
    return tiles.new_empty((out_features, _ceil_div(in_features * bits, 8)))
