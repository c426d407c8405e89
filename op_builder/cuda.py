"""The extension with the CUDA kernels, and the architectures that it is compiled for."""

from __future__ import annotations

import os
import re
from typing import Any, NamedTuple

import torch

from .builder import ExtensionBuilder, deepspeed_builder
from .cuda_sources import CUDA_SOURCES

#: What is compiled ahead of time where TORCH_CUDA_ARCH_LIST names nothing: sm_80's kernels also as PTX, for any
#: later GPU, and Hopper's own.
DEFAULT_ARCHITECTURES = "8.0+PTX;9.0a"
OLDEST = (8, 0)

#: TORCH_CUDA_ARCH_LIST also takes these names.
_FAMILIES = {"Ampere": "8.0;8.6+PTX", "Ada": "8.9+PTX", "Hopper": "9.0+PTX", "Blackwell": "10.0;10.3;12.0;12.1+PTX"}


class Architecture(NamedTuple):
    """``9.0a`` or ``8.0+PTX``, as TORCH_CUDA_ARCH_LIST spells it."""

    major: int
    minor: int
    feature: str
    ptx: bool

    @classmethod
    def parse(cls, text: str) -> Architecture:
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", text)
        if match is None:
            raise ValueError(f"TORCH_CUDA_ARCH_LIST holds {text!r}; entries look like 8.0, 9.0a or 8.0+PTX")
        return cls(int(match[1]), int(match[2]), match[3], bool(match[4]))

    @property
    def flags(self) -> list[str]:
        number = f"{self.major}{self.minor}{self.feature}"
        codes = [f"sm_{number}"] + [f"compute_{number}"] * self.ptx
        return [f"-gencode=arch=compute_{number},code={code}" for code in codes]

    def runs_on(self, capability: tuple[int, int]) -> bool:
        """Whether code for this architecture runs on a GPU of ``capability``."""
        if self.feature:
            return capability == (self.major, self.minor)
        if self.ptx:
            return capability >= (self.major, self.minor)
        return capability[0] == self.major and capability[1] >= self.minor

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}{self.feature}{'+PTX' * self.ptx}"


class CUDABuilder(ExtensionBuilder, deepspeed_builder.CUDAOpBuilder):
    """Compiles for the GPUs of this machine on first use, ahead of time for ``DEFAULT_ARCHITECTURES``.

    ``TORCH_CUDA_ARCH_LIST`` comes before both. Architectures before 8.0 are left out.
    """

    NAME = "ds_fp6_cuda"

    def label(self) -> str:
        return f"the CUDA kernels for {', '.join(map(str, self.architectures()))}"

    def sources(self) -> list[str]:
        return list(CUDA_SOURCES)

    def nvcc_args(self) -> list[str]:
        # NOTE: no --use_fast_math: quantization divides as IEEE has it, to be exact to the bit.
        return ["-O3", "-lineinfo", *self.compute_capability_args()]

    def compute_capability_args(self, cross_compile_archs: str | None = None) -> list[str]:
        """nvcc's ``-gencode`` flags. Unlike upstream's, leaves TORCH_CUDA_ARCH_LIST alone and reads ``9.0a``.

        Raises ``RuntimeError`` where no architecture of 8.0 or newer is left.
        """
        return [flag for architecture in self.architectures(cross_compile_archs) for flag in architecture.flags]

    def architectures(self, cross_compile_archs: str | None = None) -> list[Architecture]:
        """What to compile for, each once, oldest first."""
        named = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip() or cross_compile_archs
        if not named:
            present = sorted({f"{major}.{minor}" for major, minor in _capabilities()})
            named = ";".join(present) or DEFAULT_ARCHITECTURES
        for family, members in _FAMILIES.items():
            named = named.replace(family, members)
        kept = self.filter_ccs(re.split(r"[;,\s]+", named.strip("; ")))
        if not kept:
            raise RuntimeError(
                f"{self.NAME}: the kernels need compute capability {OLDEST[0]}.{OLDEST[1]} or newer; asked for: {named}"
            )
        return kept

    def filter_ccs(self, ccs: list[str]) -> list[Architecture]:
        """Drops what is older than 8.0. Hopper's kernels need ``9.0a``, of which there is no PTX."""
        kept = set()
        for architecture in map(Architecture.parse, ccs):
            if architecture[:2] == (9, 0):
                kept.add(Architecture(9, 0, "a", False))
            elif architecture[:2] >= OLDEST:
                kept.add(architecture)
        return sorted(kept)

    def missing(self) -> list[str]:
        from torch.utils import cpp_extension

        lacking = super().missing()
        if torch.version.cuda is None:
            return [f"torch {torch.__version__} is built without CUDA (install a CUDA build of torch)", *lacking]
        home = cpp_extension.CUDA_HOME
        nvcc = None if home is None else os.path.join(home, "bin", "nvcc")
        if nvcc is None or not os.access(nvcc, os.X_OK):
            where = "CUDA_HOME is not set and nvcc is not on PATH" if nvcc is None else f"{nvcc} does not exist"
            lacking.insert(0, f"no nvcc: {where} (install the CUDA toolkit {torch.version.cuda})")
        architectures = self.architectures()
        for gpu in sorted(set(_capabilities())):
            if not any(architecture.runs_on(gpu) for architecture in architectures):
                built = ", ".join(map(str, architectures))
                lacking.append(f"code for {built} does not run on compute capability {gpu[0]}.{gpu[1]} of a GPU here")
        return lacking

    def fingerprint(self) -> dict[str, str]:
        return {**super().fingerprint(), "cuda": str(torch.version.cuda)}

    def record(self) -> dict[str, Any]:
        return {**super().record(), "architectures": [str(architecture) for architecture in self.architectures()]}

    def fits(self, record: dict[str, Any]) -> bool:
        """Also whether the GPUs of this machine are among those that it was built for."""
        built = [Architecture.parse(text) for text in record.get("architectures", ())]
        return super().fits(record) and all(any(a.runs_on(gpu) for a in built) for gpu in _capabilities())

    def builder(self) -> Any:
        from torch.utils.cpp_extension import CUDAExtension

        return CUDAExtension(
            self.absolute_name(),
            self.sources(),
            include_dirs=[self.deepspeed_src_path(include) for include in self.include_paths()],
            extra_compile_args={"cxx": self.cxx_args(), "nvcc": self.nvcc_args()},
        )


def _capabilities() -> list[tuple[int, int]]:
    """The compute capability of each GPU that torch sees."""
    return [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
