"""The extension with the CPU kernels."""

from __future__ import annotations

from .builder import ExtensionBuilder


class CPUBuilder(ExtensionBuilder):
    """One library for every instruction set: the sources choose their own targets, and CPUID picks at run time."""

    NAME = "ds_fp6_cpu"

    def label(self) -> str:
        return "the CPU kernels"

    def sources(self) -> list[str]:
        return [
            "csrc/cpu/bindings.cpp",
            "csrc/cpu/isa.cpp",
            "csrc/cpu/scratch.cpp",
            "csrc/cpu/linear_generic.cpp",
            "csrc/cpu/linear_avx2.cpp",
            "csrc/cpu/linear_avx512_base.cpp",
            "csrc/cpu/linear_avx512.cpp",
            "csrc/cpu/ragged_bindings.cpp",
            "csrc/cpu/ragged_generic.cpp",
            "csrc/cpu/ragged_avx2.cpp",
            "csrc/cpu/ragged_avx512.cpp",
        ]
