"""The CUDA kernels on a CPU, thread by thread: see tests/cpp/emulated_gpu/gpu.h. Needs no GPU and no CUDA toolkit."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import ahead
import pytest

ROOT = Path(__file__).parent.parent
EMULATED = ROOT / "tests" / "cpp" / "emulated_gpu"


def built(directory: Path) -> Path:
    """check_kernels.cpp, built on copies of the kernels beside which the emulation stands in for ptx.cuh."""
    shutil.copytree(ROOT / "csrc" / "common", directory / "csrc" / "common")
    shutil.copytree(ROOT / "csrc" / "cuda", directory / "csrc" / "cuda")
    shutil.copy(EMULATED / "ptx.cuh", directory / "csrc" / "cuda" / "ptx.cuh")
    linear = directory / "csrc" / "cuda" / "linear_sm80.cuh"
    linear.write_text(linear.read_text().replace("extern __shared__", "extern"))
    compiler = ahead.run(
        "c++", "-std=c++17", "-O0", "-frounding-math", "-ffp-contract=off", "-Wno-unknown-pragmas",
        f"-I{EMULATED}", f"-I{EMULATED.parent}", f"-I{directory / 'csrc'}", ROOT / "tests" / "cpp" / "check_kernels.cpp",
        "-o", directory / "check_kernels",
    )  # fmt: skip
    assert compiler.returncode == 0, compiler.stderr
    return directory / "check_kernels"


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler: c++ is not on PATH")
@ahead.made_by(built)
@pytest.mark.parametrize("part", ["linear", "quantize"])
def test_kernels_compute_what_they_are_defined_to(made: Path, part: str) -> None:
    seed = os.environ.get("DS_FP6_TEST_SEED") or str(int.from_bytes(os.urandom(3), "little"))
    print(f"DS_FP6_TEST_SEED={seed} repeats these numbers")
    result = subprocess.run([str(made), part, seed], capture_output=True, text=True)
    assert (result.returncode, result.stdout.split()) == (0, [part]), result.stdout + result.stderr
