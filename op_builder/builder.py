"""What the builders share: where sources lie, what a build needs, and prebuilt, else built on first use.

An extension has no Python functions. Loading it registers its operators with torch.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import sys
import sysconfig
from abc import abstractmethod
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from .cache import BuildDirectory, cache_root, digest

#: Holds ``csrc`` and, when installed, the prebuilt extensions: the ``ds_fp6`` package, or a checkout's top.
ROOT = Path(__file__).parent.parent


def _deepspeed_builder() -> ModuleType:
    """DeepSpeed's builder module. Importing the whole of DeepSpeed takes seconds, so only this file is loaded.

    Raises ``RuntimeError`` where DeepSpeed is not installed.
    """
    loaded = sys.modules.get("deepspeed.ops.op_builder.builder")
    if loaded is not None:
        return loaded
    package = importlib.util.find_spec("deepspeed")
    if package is None or not package.submodule_search_locations:
        raise RuntimeError("ds_fp6: DeepSpeed, whose op builder this is, is not installed: pip install deepspeed")
    path = Path(package.submodule_search_locations[0], "ops", "op_builder", "builder.py")
    return _import_file("ds_fp6_deepspeed_builder", path)


def _import_file(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


deepspeed_builder = _deepspeed_builder()


class ExtensionBuilder(deepspeed_builder.OpBuilder):
    """Builds and loads the extension ``NAME``.

    ``load()`` takes the prebuilt extension if there is one for these sources and this torch; else it compiles,
    holding a file lock, into a directory of the user's cache. Later processes load from there.
    """

    NAME: str
    BUILD_VAR = "DS_BUILD_FP6"

    def __init__(self, name: str | None = None) -> None:
        super().__init__(name=name or self.NAME)

    @abstractmethod
    def label(self) -> str:
        """What is built, as the notice names it."""

    def absolute_name(self) -> str:
        return f"ds_fp6.{self.NAME}"

    def deepspeed_src_path(self, code_path: str) -> str:
        return str(ROOT / code_path)

    def include_paths(self) -> list[str]:
        return ["csrc"]

    def cxx_args(self) -> list[str]:
        return ["-O3", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas"]

    def extra_ldflags(self) -> list[str]:
        # NOTE: what GCC compiles finds the OpenMP runtime that torch has loaded. Linked to one of its own, an
        # extension could start a second pool of threads.
        openmp = ["-fopenmp"] if "clang" in os.environ.get("CXX", "") else []
        # NOTE: some compilers link the C++ library statically. Of two copies in a process, what is unique to a process
        # comes from one and the rest from the other: the numbers in an error message then call any function at all.
        return [*openmp, "-Wl,--exclude-libs,libstdc++.a"]

    def missing(self) -> list[str]:
        """What this machine lacks to compile the extension, each with what to do about it; empty if nothing."""
        lacking = []
        compiler = os.environ.get("CXX", "c++")
        if shutil.which(compiler.split()[0]) is None:
            lacking.append(f"no C++ compiler: {compiler!r} is not on PATH (install g++ or clang, or set CXX)")
        python_header = Path(sysconfig.get_path("include"), "Python.h")
        if not python_header.is_file():
            lacking.append(f"no Python headers: {python_header} does not exist (install python3-dev)")
        torch_header = Path(torch.__file__).parent / "include" / "torch" / "library.h"
        if not torch_header.is_file():
            lacking.append(f"no torch headers: {torch_header} does not exist (reinstall torch from a wheel)")
        if _ninja_directory() is None:
            lacking.append("no ninja (pip install ninja)")
        if importlib.util.find_spec("setuptools") is None:
            lacking.append("no setuptools (pip install setuptools)")
        lacking += [f"source {s} does not exist" for s in self.sources() if not (ROOT / s).is_file()]
        return lacking

    def is_compatible(self, verbose: bool = False) -> bool:
        self.error_log = "; ".join(self.missing()) or None
        return self.error_log is None

    def fingerprint(self) -> dict[str, str]:
        """What a prebuilt extension must have been made from and for, in order to be used."""
        return {"torch": torch.__version__, "python": sys.implementation.cache_tag, "sources": digest(self._watched())}

    def prebuilt(self) -> Path | None:
        """The extension that was built ahead of time, if it fits; sources edited since then make it unfit."""
        record = ROOT / self._record_name
        if not record.is_file() or not self.fits(json.loads(record.read_text())):
            return None
        candidates = (ROOT / f"{self.NAME}{suffix}" for suffix in EXTENSION_SUFFIXES)
        return next((path for path in candidates if path.is_file()), None)

    def fits(self, record: dict[str, Any]) -> bool:
        return self.fingerprint().items() <= record.items()

    def record(self) -> dict[str, Any]:
        """What ``fits`` will look at."""
        return self.fingerprint()

    def write_record(self, directory: Path) -> None:
        """Keeps the record of the extension in ``directory`` beside it."""
        (directory / self._record_name).write_text(json.dumps(self.record()))

    @property
    def _record_name(self) -> str:
        return f"{self.NAME}.json"

    def build_directory(self) -> BuildDirectory:
        """Where this torch and Python, with these flags, keep the extension of these sources."""
        flags = (torch.__version__, sys.implementation.cache_tag, os.environ.get("CXX"), os.environ.get("CXXFLAGS"))
        parts = (*flags, ROOT.resolve(), *self.cxx_args(), *self.nvcc_args(), *self.extra_ldflags())
        key = hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:12]
        return BuildDirectory(cache_root() / f"{self.NAME}-{key}", self.NAME)

    def status(self) -> dict[str, Any]:
        """``state`` (prebuilt, built, not built), ``path``, and ``missing``: what is lacking to build it here."""
        prebuilt = self.prebuilt()
        if prebuilt:
            return {"state": "prebuilt", "path": str(prebuilt), "missing": []}
        try:
            directory = self.build_directory()
        except RuntimeError as error:
            return {"state": "not built", "path": None, "missing": [str(error)]}
        state = "built" if directory.is_current(self._watched()) else "not built"
        return {"state": state, "path": str(directory.path), "missing": self.missing()}

    def load(self, verbose: bool = False) -> ModuleType:
        """Loads the extension once a process. Raises ``RuntimeError`` that says what is missing to build it."""
        if self.NAME not in self._loaded_ops:
            prebuilt = self.prebuilt()
            self._loaded_ops[self.NAME] = _import_file(self.NAME, prebuilt) if prebuilt else self.jit_load(verbose)
        return self._loaded_ops[self.NAME]

    def jit_load(self, verbose: bool = False) -> ModuleType:
        directory, files = self.build_directory(), self._watched()
        with directory.locked(f"ds_fp6: waiting for another process that builds {self.NAME} in {directory.path}"):
            if directory.is_current(files):
                return _import_file(self.NAME, directory.library)
            if not self.is_compatible(verbose):
                raise RuntimeError(f"{self.NAME}: {self.error_log}")
            print(f"ds_fp6: building {self.label()} in {directory.path} (once)", file=sys.stderr, flush=True)
            with directory.rebuilding(files):
                return self._compile(directory.path, verbose)

    def _compile(self, directory: Path, verbose: bool) -> ModuleType:
        from torch.utils import cpp_extension

        path = os.environ.get("PATH", "")
        os.environ["PATH"] = os.pathsep.join((path, str(_ninja_directory())))
        try:
            return cpp_extension.load(
                self.NAME,
                [self.deepspeed_src_path(source) for source in self.sources()],
                extra_cflags=self.cxx_args(),
                extra_cuda_cflags=self.nvcc_args(),
                extra_ldflags=self.extra_ldflags(),
                extra_include_paths=[self.deepspeed_src_path(include) for include in self.include_paths()],
                build_directory=str(directory),
                verbose=verbose,
            )
        except RuntimeError as error:
            raise RuntimeError(f"{self.NAME}: the build in {directory} failed: {error}") from error
        finally:
            os.environ["PATH"] = path

    def _watched(self) -> list[Path]:
        """The files that the extension is made of: its sources, and the headers in their directories."""
        directories = {ROOT / "csrc" / "common", *((ROOT / source).parent for source in self.sources())}
        return sorted(path for directory in directories for path in directory.iterdir() if path.is_file())


def _ninja_directory() -> Path | None:
    """The directory of ninja: on PATH, or beside this interpreter, whose environment need not be activated."""
    beside = os.pathsep.join((os.environ.get("PATH", ""), str(Path(sys.executable).parent)))
    found = shutil.which("ninja", path=beside)
    return Path(found).parent if found else None
