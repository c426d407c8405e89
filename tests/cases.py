"""Shapes, formats and random weights that the kernel tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from ds_fp6 import ops

#: Kernels of the CPU extension, as ``DS_FP6_CPU_ISA`` names them.
CPU_ISAS = ["generic", "avx2", "avx512_base", "avx512_vbmi", "avx512_bf16"]

#: (N, K) around every tile and chunk size: 8, 16, 32 and 64 codes, tiles of 8 to 64 rows, segments of 256 and 512.
WEIGHT_SHAPES = [(1, 1), (3, 7), (64, 63), (65, 64), (7, 65), (129, 129), (17, 515), (66, 1090)]

#: 0 is one scale a row; others fit a kernel's chunks, or do not, or exceed K.
GROUP_SIZES = [0, 64, 7, 128, 1]

#: (N, K) for the GPU's linear layers: single elements, around its 64-wide panels and 128-wide tiles, shards of models.
GPU_SHAPES = [(1, 1), (7, 8), (63, 65), (64, 64), (65, 127), (129, 192), (191, 3696), (3584, 248), (1000, 7392)]

#: Tokens: around the widths of MMAs and tiles.
GPU_TOKENS = [*range(1, 18), *(t + d for t in (32, 64, 128, 256, 512) for d in (-1, 0, 1)), 1000, 4096]


def use_isa(name: str) -> Iterator[str]:
    """For a fixture: runs a test with one of ``CPU_ISAS``, or skips it where the CPU lacks that."""
    ops.load("CPU")
    available = torch.ops.ds_fp6.cpu_isa().partition(": ")[2].split()
    if name not in available:
        pytest.skip(f"this CPU has no {name}; it runs {', '.join(available)}")
    torch.ops.ds_fp6.select_cpu_isa(name)
    yield name
    torch.ops.ds_fp6.select_cpu_isa("")


def fresh_generator() -> torch.Generator:
    """Different numbers in every run; the seed is printed, and pytest shows it when a test fails."""
    seed = int(os.environ.get("DS_FP6_TEST_SEED", "0")) or int.from_bytes(os.urandom(4), "little")
    print(f"DS_FP6_TEST_SEED={seed} repeats these numbers")
    return torch.Generator().manual_seed(seed)


def random_weight(n: int, k: int, generator: torch.Generator) -> torch.Tensor:
    """fp32 [N, K], normal, with rows of very different size; fits fp16."""
    row = torch.exp(2 * torch.randn((n, 1), generator=generator))
    return (torch.randn((n, k), generator=generator) * row).clamp(-6e4, 6e4)
