"""What the extension with the CUDA kernels is made of. Instantiations are spread over files to compile side by side."""

from __future__ import annotations

CUDA_SOURCES = [
    "csrc/cuda/bindings.cpp",
    "csrc/cuda/linear.cpp",
    "csrc/cuda/quantize.cpp",
    "csrc/cuda/workspace.cpp",
    "csrc/cuda/linear_sm80.cpp",
    *(f"csrc/cuda/linear_sm80_{dtype}_{bits}.cu" for dtype in ("f16", "bf16") for bits in range(3, 9)),
    "csrc/cuda/linear_sm90.cu",
    *(f"csrc/cuda/linear_sm90_{x}{fmt}.cu" for x in ("", "bf16_") for fmt in ("e3m2", "e2m3", "e2m2", "e2m1", "e4m3")),
    "csrc/cuda/quantize_dispatch.cpp",
    *(f"csrc/cuda/quantize_{bits}.cu" for bits in range(3, 9)),
]
