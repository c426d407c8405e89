"""The CUDA kernels compile with nvcc alone, for sm_80 and for Hopper, without spilling registers. Needs no GPU."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import ahead
import pytest

CSRC = Path(__file__).parent.parent / "csrc"

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no CUDA compiler: nvcc is not on PATH")

#: One format of each kind of bit map: bytes with virtual words, segments, bytes that fp16 must halve.
SOURCE = """
#include "cuda/linear_sm80.cuh"
#include "cuda/quantize_launch.cuh"

using namespace ds_fp6;
using namespace ds_fp6::cuda;

#define LINEAR(E, M, T, TOKENS, WARPS_K, STAGES, GROUPED)                                                        \\
    template __global__ void sm80::linear_sm80_kernel<Format<E, M>, T, sm80::Tile<TOKENS, WARPS_K, STAGES>, GROUPED>( \\
        const __grid_constant__ sm80::Problem);
#define ALL_TILES(E, M, T)                                                                                       \\
    LINEAR(E, M, T, 16, 2, 4, false) LINEAR(E, M, T, 32, 2, 4, false) LINEAR(E, M, T, 64, 2, 3, false)           \\
    LINEAR(E, M, T, 128, 1, 4, false) LINEAR(E, M, T, 16, 2, 4, true) LINEAR(E, M, T, 64, 2, 3, true)
ALL_TILES(3, 2, Half)
ALL_TILES(3, 2, BFloat16)
LINEAR(2, 2, Half, 16, 2, 4, false)
LINEAR(2, 1, Half, 16, 2, 4, false)
LINEAR(3, 3, BFloat16, 16, 2, 4, false)
LINEAR(1, 6, Half, 64, 2, 3, true)
LINEAR(5, 2, Half, 128, 1, 4, false)
DS_FP6_INSTANTIATE_TILES(3, 2)
"""

#: Registers a thread may have at most, by kernel: what lets as many blocks share an SM as its tile counts on.
LINEAR_REGISTERS = {
    (16, False): 80, (32, False): 128, (64, False): 200, (128, False): 200, (16, True): 128, (64, True): 240
}
OTHER_REGISTERS = {"quantize_kernel": 64, "dequantize_kernel": 64, "unpack_kernel": 64, "pack_kernel": 64}


def compiled(folder: Path, architecture: str) -> subprocess.CompletedProcess:
    """nvcc with what ptxas reports."""
    source = folder / "kernels.cu"
    source.write_text(SOURCE)
    return ahead.run(
        "nvcc", "-std=c++17", "-O3", f"-gencode=arch=compute_{architecture},code=sm_{architecture}", "-Xptxas", "-v",
        "-Werror", "all-warnings", f"-I{CSRC}", "-cubin", "-o", folder / "kernels.cubin", source,
    )  # fmt: skip


@ahead.made_by(compiled)
@pytest.mark.parametrize("architecture", ["80", "90a"])
def test_no_kernel_spills(made: subprocess.CompletedProcess, architecture: str) -> None:
    assert made.returncode == 0, made.stderr
    reports = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
        made.stderr, re.DOTALL,
    )
    assert len(reports) == 17 + 6 + 6 + 2 + 2, [name for name, *_ in reports]
    for name, stores, loads, registers in reports:
        assert (int(stores), int(loads)) == (0, 0), f"{name} spills {stores} + {loads} bytes for sm_{architecture}"
        assert int(registers) <= _most_registers(name), f"{name} takes {registers} registers for sm_{architecture}"


def _most_registers(name: str) -> int:
    linear = re.search(r"linear_sm80_kernelI.*FormatILi(\d)ELi(\d)E.*TileILi(\d+)E.*Lb([01])E", name)
    if linear is None:
        return next(most for kernel, most in OTHER_REGISTERS.items() if kernel in name)
    exponent_bits, mantissa_bits, tokens, grouped = map(int, linear.groups())
    if tokens == 16 and 1 + exponent_bits + mantissa_bits > 6:
        return 128
    return LINEAR_REGISTERS[tokens, bool(grouped)]
