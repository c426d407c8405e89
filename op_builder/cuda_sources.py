"""What the extension with the CUDA kernels is made of. Instantiations are spread over files to compile side by side, those
that take longest first: a machine with a core for each of them is done when they are."""

from __future__ import annotations

_SM90_FORMATS = ("e3m2", "e2m3", "e2m2", "e2m1", "e4m3")

CUDA_SOURCES = [
    *(f"csrc/cuda/linear_sm90_{fmt}.cu" for fmt in _SM90_FORMATS),
    "csrc/cuda/bindings.cpp",
    "csrc/cuda/linear.cpp",
    "csrc/cuda/quantize.cpp",
    *(f"csrc/cuda/linear_sm90_bf16_{fmt}.cu" for fmt in _SM90_FORMATS),
    *(f"csrc/cuda/quantize_{bits}.cu" for bits in range(8, 2, -1)),
    *(f"csrc/cuda/linear_sm80_{dtype}_{bits}.cu" for bits in range(8, 2, -1) for dtype in ("f16", "bf16")),
    "csrc/cuda/linear_sm80.cpp",
    "csrc/cuda/linear_sm90.cu",
    "csrc/cuda/quantize_dispatch.cpp",
    "csrc/cuda/workspace.cpp",
]
