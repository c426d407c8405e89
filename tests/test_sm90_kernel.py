"""The Hopper kernel where there is no Hopper: its C++ on an emulated GPU, and what ptxas says about it.

The emulator does asynchronous work as late as the kernel may rely on (``tests/cpp/sm90_emulator/emulator.h``), so that a
missing wait, a slot given away too early and a deadlock show. It sees no instruction: those the GPU's own tests check.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import ahead
import pytest

ROOT = Path(__file__).parent.parent
CUDA = ROOT / "csrc" / "cuda"
EMULATOR = ROOT / "tests" / "cpp" / "sm90_emulator"

NVCC = shutil.which("nvcc")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no CUDA toolkit: nvcc is not on PATH")

#: m, n, k, group size, bias (0 none, 1 of x's type, 2 fp32), SMs, tile (0 the heuristics' choice): every tile, whole and
#: cut along K, one piece a worker and several, ragged in every direction, clusters that exchange halves.
CASES = [
    (1, 64, 64, 0, 0, 4, 0), (1, 7, 8, 0, 1, 2, 0), (8, 200, 1032, 0, 1, 3, 0), (5, 1000, 776, 0, 2, 5, 0),
    (16, 64, 4096, 0, 0, 7, 0), (16, 200, 2000, 0, 1, 3, 0), (32, 300, 1288, 0, 2, 3, 0), (32, 300, 1288, 0, 1, 3, 1),
    (33, 520, 640, 0, 1, 4, 0), (64, 600, 1032, 0, 0, 5, 0), (64, 256, 2048, 0, 1, 6, 0), (64, 1000, 520, 0, 0, 2, 2),
    (64, 256, 1032, 0, 1, 8, 2),
    (8, 500, 1032, 0, 1, 5, 3), (13, 520, 1032, 0, 2, 3, 4),
    (20, 500, 1032, 0, 1, 5, 5), (30, 300, 904, 0, 0, 6, 6), (50, 300, 2000, 0, 1, 8, 7),
    (128, 300, 904, 0, 1, 6, 10), (300, 600, 328, 0, 1, 6, 9), (300, 520, 328, 0, 1, 6, 8),
    (48, 520, 1032, 0, 1, 4, 11), (37, 300, 904, 0, 0, 6, 12), (41, 300, 832, 0, 2, 6, 12), (90, 300, 776, 0, 1, 3, 13),
    (96, 264, 520, 0, 0, 4, 14), (190, 200, 776, 0, 1, 6, 15), (64, 300, 1032, 0, 1, 6, 0), (64, 300, 904, 0, 0, 6, 16),
    (13, 200, 3000, 0, 1, 8, 17), (3, 64, 4096, 0, 0, 4, 17), (16, 520, 1032, 0, 2, 6, 17), (30, 128, 1024, 0, 0, 4, 6),
    (30, 300, 1032, 0, 1, 6, 18), (17, 128, 1536, 0, 0, 4, 18), (9, 64, 64, 0, 1, 2, 0), (64, 300, 704, 0, 2, 6, 16), (65, 300, 520, 0, 1, 4, 0), (128, 520, 776, 0, 0, 7, 0), (200, 256, 640, 0, 2, 3, 0),
]  # fmt: skip
GROUPED = [(5, 100, 520, 64, 1, 3, 0), (16, 200, 776, 128, 0, 4, 0), (30, 300, 520, 192, 1, 3, 0), (100, 257, 648, 128, 2, 3, 0)]

#: Rows lie apart, as a slice's do.
BF16_CASES = [
    *CASES[2:15:4], GROUPED[0], GROUPED[1], GROUPED[3], (7, 64, 33000, 0, 0, 4, 0),
    (1, 64, 64, 0, 0, 4, 0), (7, 200, 1096, 0, 1, 3, 0), (16, 520, 1288, 0, 2, 6, 0), (40, 300, 904, 0, 0, 6, 0), (64, 300, 1096, 0, 1, 6, 0),
    (65, 300, 520, 0, 1, 4, 0), (96, 264, 520, 0, 2, 2, 0), (90, 200, 1288, 0, 0, 4, 0), (100, 300, 1288, 0, 1, 7, 0), (128, 520, 776, 0, 0, 7, 0),
    (128, 264, 520, 0, 1, 2, 0), (97, 200, 1288, 0, 2, 4, 0), (130, 200, 328, 0, 2, 3, 9), (300, 520, 328, 0, 1, 6, 8),
    (8, 200, 3080, 0, 1, 3, 3), (13, 520, 1032, 0, 2, 3, 4), (30, 300, 904, 0, 0, 6, 6), (20, 500, 1032, 0, 1, 5, 5),
    (29, 300, 1032, 0, 2, 8, 18),
]  # fmt: skip


def _cuda_include() -> Path:
    include = Path(NVCC).resolve().parent.parent / "include"
    if (include / "cuda_fp16.h").exists():
        return include
    return next(Path("/usr/local").glob("cuda*/include/cuda_fp16.h")).parent


#: Format, and a flag more, of a program for a type of x.
PROGRAMS = {"__half": ("3, 2", "-g0"), "__nv_bfloat16": ("2, 2", "-DDS_FP6_EVERY_LANE_ARRIVES")}


def emulated(sources: Path, dtype: str, cases: tuple) -> subprocess.CompletedProcess:
    """Runs the kernel's sources with the emulator's headers in place of those that hold PTX."""
    fmt, flag = PROGRAMS[dtype]
    shutil.copytree(ROOT / "csrc" / "common", sources / "common")
    for source in [*CUDA.glob("linear_sm90*.h"), *CUDA.glob("linear_sm90*.cuh"), CUDA / "linear.h", CUDA / "dequant.cuh", CUDA / "gate.cuh"]:
        shutil.copy(source, sources)
    for source in EMULATOR.iterdir():
        shutil.copy(source, sources)
    compiler = ahead.run(
        "c++", "-std=c++17", "-O2", "-w", "-Wno-psabi", "-D__CUDA_ARCH_FEAT_SM90_ALL",
        f"-DEMULATED_FORMAT=Format<{fmt}>", f"-DEMULATED_ELEMENT={dtype}", flag, f"-I{sources}",
        f"-I{EMULATOR.parent}", f"-I{_cuda_include()}", sources / "main.cpp", "-o", sources / "emulate",
    )  # fmt: skip
    assert compiler.returncode == 0, compiler.stderr
    return ahead.run(sources / "emulate", *(number for case in cases for number in case))


@needs_nvcc
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler: c++ is not on PATH")
@ahead.made_by(emulated)
@pytest.mark.parametrize("dtype, cases", [("__half", (*CASES, *GROUPED)), ("__nv_bfloat16", tuple(BF16_CASES))])
def test_emulated_kernel_agrees_with_double_precision(
    made: subprocess.CompletedProcess, dtype: str, cases: tuple
) -> None:  # fmt: skip
    assert (made.returncode, made.stdout.strip()) == (0, "right"), made.stdout + made.stderr


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler: c++ is not on PATH")
def test_schedule_does_every_step_once(tmp_path: Path) -> None:
    program = tmp_path / "check_schedule"
    source = ROOT / "tests" / "cpp" / "check_schedule.cpp"
    subprocess.run(["c++", "-std=c++17", "-O2", f"-I{ROOT / 'csrc'}", str(source), "-o", str(program)], check=True)
    result = subprocess.run([str(program)], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0 and result.stdout.strip() == "right", result.stdout


@needs_nvcc
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler: c++ is not on PATH")
def test_every_problem_has_a_plan(tmp_path: Path) -> None:
    program = tmp_path / "check_plan"
    source = ROOT / "tests" / "cpp" / "check_plan.cpp"
    subprocess.run(
        ["c++", "-std=c++17", "-O2", f"-I{ROOT / 'csrc'}", f"-I{_cuda_include()}", str(source), "-o", str(program)],
        check=True,
    )  # fmt: skip
    result = subprocess.run([str(program)], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0 and result.stdout.strip() == "right", result.stdout


def race(folder: Path) -> subprocess.CompletedProcess:
    return ahead.run(
        NVCC, "-std=c++17", "-gencode=arch=compute_90a,code=sm_90a", f"-I{ROOT / 'csrc'}", f"-I{CUDA}",
        "-DTILES=RACE(Tile8)", "-o", folder / "race_tiles", ROOT / "tests" / "cpp" / "race_tiles.cu",
    )  # fmt: skip


@needs_nvcc
@ahead.made_by(race)
def test_the_race_of_tiles_compiles(made: subprocess.CompletedProcess) -> None:
    assert made.returncode == 0, made.stdout + made.stderr


#: A file of kernels, how many there are in it, and the registers with which those of some tiles start.
KERNELS = [
    ("linear_sm90_e3m2.cu", 24, {"TileILi4ELi128E": 168, "TileILi2ELi32ELi4ELi5ELi4E": 96}),
    ("linear_sm90_bf16_e3m2.cu", 24, {"TileILi4ELi128E": 168, "TileILi2ELi32ELi4ELi5ELi4E": 96}),
]


def assembled(folder: Path, source: str) -> subprocess.CompletedProcess:
    """nvcc with what ptxas reports."""
    return ahead.run(
        NVCC, "-std=c++17", "-O3", "-gencode=arch=compute_90a,code=sm_90a", "-Xptxas", "-v", f"-I{ROOT / 'csrc'}",
        "-cubin", "-o", folder / "kernels.cubin", CUDA / source,
    )  # fmt: skip


@needs_nvcc
@ahead.made_by(assembled)
@pytest.mark.parametrize("source, instances, starts", KERNELS)
def test_ptxas_neither_spills_nor_serializes(
    made: subprocess.CompletedProcess, source: str, instances: int, starts: dict[str, int]
) -> None:  # fmt: skip
    report = made.stdout + made.stderr
    assert made.returncode == 0, report
    kernels = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", report)
    assert len(kernels) == instances and set(kernels) == {("0", "0")}, report
    # Warpgroups hand registers around (setmaxnreg) out of what the block starts with: with less they would wait forever.
    for tile, start in starts.items():
        used = re.findall(rf"entry function '\w*{tile}\w*'.*?Used (\d+) registers", report, re.DOTALL)
        assert [int(count) for count in used] == [start], report
    # C7508: setmaxnreg ignored. C7510 to C7519: wgmmas wait for each other.
    assert not re.findall(r"\(C75\d\d\)", report), report
