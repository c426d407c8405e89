"""Packaging. ``DS_BUILD_FP6=1 pip install .`` compiles the extensions; otherwise they are built on first use."""

from __future__ import annotations

import json
import os
import runpy
import sys
import sysconfig
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent.resolve()

#: What `ds-fp6 serve` needs.
SERVE = ["fastapi", "prometheus-client", "pydantic>=2", "uvicorn>=0.30"]
#: GPU kernels of the engine, which its tests run on a CPU too. torch's CUDA builds for Linux bring it.
TRITON = ["triton>=3.6; platform_system == 'Linux'"]


def supported(distribution: str) -> str:
    """The requirement that the hooks' own table of supported versions makes of ``distribution``."""
    table = runpy.run_path(str(ROOT / "ds_fp6" / "integrations" / "versions.py"))["SUPPORTED"]
    return table[distribution].requirement


def ahead_of_time() -> dict:
    """The arguments of ``setup`` that compile the extensions."""
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    # NOTE: pip hides the environment that it installs into from an isolated build. The extensions must be compiled
    # against the torch that is there.
    sys.path[:0] = [str(ROOT)]
    sys.path += [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension

        import op_builder
    except ImportError as error:
        raise SystemExit(
            f"DS_BUILD_FP6=1 compiles against torch and deepspeed, but {error.name} is not installed in "
            f"{sysconfig.get_path('purelib')}; install it first: pip install torch deepspeed"
        ) from error

    builders = [op_builder.CPUBuilder()] + [op_builder.CUDABuilder()] * (torch.version.cuda is not None)
    for builder in builders:
        if not builder.is_compatible():
            raise SystemExit(f"{builder.NAME}: {builder.error_log}")

    class BuildAndRecord(BuildExtension):
        """Writes beside each extension what it was built from, by which it is recognized as up to date."""

        def build_extensions(self) -> None:
            super().build_extensions()
            for builder in builders:
                builder.write_record(Path(self.get_ext_fullpath(builder.absolute_name())).parent)

        def copy_extensions_to_source(self) -> None:
            super().copy_extensions_to_source()
            for builder in builders:
                builder.write_record(ROOT / "ds_fp6")

    return {"ext_modules": [builder.builder() for builder in builders], "cmdclass": {"build_ext": BuildAndRecord}}


setup(
    name="ds-fp6",
    version="0.1.0",
    description="FP6-centric LLM serving: 6-bit floating-point weights in DeepSpeed-FastGen and MII",
    long_description=(ROOT / "README.md").read_text() if (ROOT / "README.md").is_file() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    # ds_fp6/op_builder and ds_fp6/csrc are links to the directories at the top.
    packages=find_packages(include=["ds_fp6", "ds_fp6.*"]),
    package_data={"ds_fp6": ["csrc/*/*", "*.json"]},
    install_requires=[
        "torch>=2.11",
        supported("transformers"),
        supported("deepspeed"),
        supported("deepspeed-mii"),
        "accelerate",
        "huggingface_hub",
        "ninja",
        "packaging",
        "psutil",
        "qtorch>=0.3.0",
        "safetensors",
        "setuptools",
        "tqdm",
        "wrapt>=1.17",
        # `import mii` needs it without saying so.
        "requests",
    ],
    extras_require={
        "test": ["pytest>=8", "pytest-timeout", "matplotlib", *SERVE, *TRITON, "openai>=2", "lm-eval[api]>=0.4.9"],
        "bench": ["matplotlib", "nvidia-ml-py"],
        "serve": SERVE,
        "triton": TRITON,
    },
    entry_points={
        "console_scripts": ["ds-fp6 = ds_fp6.cli:main"],
        "torch.backends": ["ds_fp6 = ds_fp6.autoload:activate"],
    },
    **(ahead_of_time() if os.environ.get("DS_BUILD_FP6") == "1" else {}),
)
