"""Runs CUDA tests where DeepSpeed, on whose builder the extensions' own rests, is not installed.

    python tests/cuda_without_deepspeed.py [pytest's arguments]

Builds for this machine's GPU; ``DS_FP6_TEST_GENCODE`` takes other flags for nvcc, such as
``-gencode=arch=compute_80,code=sm_90`` to test the kernels of compute capability 8.0 on a Hopper GPU.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from ds_fp6 import ops  # noqa: E402


def sources(key: str) -> list[str]:
    if key == "CPU":
        return re.findall(r'"(csrc/cpu/[^"]+\.cpp)"', (ROOT / "op_builder" / "cpu.py").read_text())
    spec = importlib.util.spec_from_file_location("cuda_sources", ROOT / "op_builder" / "cuda_sources.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.CUDA_SOURCES


def gencode() -> list[str]:
    named = os.environ.get("DS_FP6_TEST_GENCODE")
    if named:
        return named.split()
    major, minor = torch.cuda.get_device_capability()
    number = f"{major}{minor}" + "a" * ((major, minor) == (9, 0))
    return [f"-gencode=arch=compute_{number},code=sm_{number}"]


def build(key: str) -> None:
    flags = ["-O3", *gencode()] if key == "CUDA" else []
    tag = hashlib.sha256(" ".join((key, torch.__version__, *flags)).encode()).hexdigest()[:8]
    directory = Path(tempfile.gettempdir(), f"ds_fp6_{key}_{tag}")
    directory.mkdir(exist_ok=True)
    cpp_extension.load(
        f"ds_fp6_{key.lower()}",
        [str(ROOT / source) for source in sources(key)],
        extra_cflags=["-O3", "-fopenmp", "-fvisibility=hidden"],
        extra_cuda_cflags=flags,
        extra_ldflags=["-Wl,--exclude-libs,libstdc++.a"],  # as op_builder/builder.py says
        extra_include_paths=[str(ROOT / "csrc")],
        build_directory=str(directory),
    )


if __name__ == "__main__":
    ops.builder = lambda key: SimpleNamespace(load=lambda verbose=False: build(key))
    sys.exit(pytest.main(sys.argv[1:] or ["-q", *map(str, sorted(ROOT.glob("tests/test_cuda_*.py")))]))
