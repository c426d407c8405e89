"""The op builders: what they build, when they build again, and what they say when they cannot."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ds_fp6.op_builder import CPUBuilder, CUDABuilder
from ds_fp6.op_builder import builder as shared
from ds_fp6.op_builder.cache import BuildDirectory, digest

ROOT = Path(__file__).parent.parent

#: An extension with nothing in it but a number, so that it compiles in a second.
TOY_SOURCE = """
#include <Python.h>
#include "number.h"
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "toy", nullptr, -1, nullptr};
PyMODINIT_FUNC PyInit_toy() {
    PyObject* made = PyModule_Create(&module);
    PyModule_AddIntConstant(made, "NUMBER", NUMBER);
    return made;
}
"""
#: Loads the toy in a process of its own: an extension is loaded once a process.
LOAD_TOY = """
import sys
from pathlib import Path
from ds_fp6.op_builder import builder as shared
shared.ROOT = Path(sys.argv[1])
class Toy(shared.ExtensionBuilder):
    NAME = "toy"
    def label(self): return "a toy"
    def sources(self): return ["csrc/cpu/toy.cpp"]
    def cxx_args(self): return ["-O0"]
print(Toy().load().NUMBER)
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """The toy's tree: csrc with one source and one header."""
    (tmp_path / "csrc" / "cpu").mkdir(parents=True)
    (tmp_path / "csrc" / "common").mkdir()
    (tmp_path / "csrc" / "cpu" / "toy.cpp").write_text(TOY_SOURCE)
    set_number(tmp_path, "1")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    return tmp_path


def set_number(tree: Path, number: str) -> None:
    (tree / "csrc" / "common" / "number.h").write_text(f"#define NUMBER {number}\n")
    (tree / "csrc" / "cpu" / "number.h").write_text('#include "../common/number.h"\n')


def start_toy(tree: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", LOAD_TOY, str(tree)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)


def load_toy(tree: Path) -> tuple[str, str]:
    """The number that the loaded toy holds, and what the load said."""
    process = start_toy(tree)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out.strip(), err


def test_builds_once_for_all_processes_and_again_after_an_edit(toy):
    processes = [start_toy(toy) for _ in range(2)]
    said = [process.communicate(timeout=120) for process in processes]
    assert [out for out, _ in said] == ["1\n", "1\n"]
    notices = [line for _, err in said for line in err.splitlines() if line.startswith("ds_fp6: building")]
    assert len(notices) == 1 and "a toy" in notices[0] and str(toy / "cache") in notices[0]

    # A header of an older time, as a checkout or an unpacked archive may bring: ninja alone would not see it.
    set_number(toy, "2")
    os.utime(toy / "csrc" / "common" / "number.h", (1, 1))
    # What a build that was killed leaves behind.
    directory = next((toy / "cache").glob("toy-*"))
    (directory / "lock").touch()
    number, said = load_toy(toy)
    assert number == "2" and "building a toy" in said
    number, said = load_toy(toy)
    assert number == "2" and said == ""


def test_a_failed_build_shows_the_compilers_words(toy):
    set_number(toy, "no_such_name")
    process = start_toy(toy)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "RuntimeError: toy: the build in" in err and "no_such_name" in err


#: What an extension's error messages do: put numbers into a string.
FORMATTING = """
#include <Python.h>
#include <sstream>
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "toy", nullptr, -1, nullptr};
PyMODINIT_FUNC PyInit_toy() {
    PyObject* made = PyModule_Create(&module);
    std::ostringstream text;
    text << long(1234) << " and " << 2.5f;
    PyModule_AddStringConstant(made, "NUMBER", text.str().c_str());
    return made;
}
"""


def test_numbers_are_formatted_where_the_compiler_links_the_cpp_library_statically(toy, monkeypatch):
    (toy / "csrc" / "cpu" / "toy.cpp").write_text(FORMATTING)
    compiler = toy / "g++"
    compiler.write_text('#!/bin/sh\nexec c++ -static-libstdc++ "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    number, _ = load_toy(toy)
    assert number == "1234 and 2.5"

class Toy(shared.ExtensionBuilder):
    NAME = "toy"

    def label(self) -> str:
        return "a toy"

    def sources(self) -> list[str]:
        return ["csrc/cpu/toy.cpp"]


def test_prebuilt_is_used_until_a_source_changes(toy, monkeypatch):
    monkeypatch.setattr(shared, "ROOT", toy)
    assert Toy().prebuilt() is None
    library = toy / "toy.so"
    library.touch()
    Toy().write_record(toy)
    assert Toy().prebuilt() == library and Toy().status()["state"] == "prebuilt"
    set_number(toy, "3")
    assert Toy().prebuilt() is None and Toy().status()["state"] == "not built"


def test_prebuilt_for_another_torch_is_not_used(toy, monkeypatch):
    monkeypatch.setattr(shared, "ROOT", toy)
    (toy / "toy.so").touch()
    (toy / "toy.json").write_text(json.dumps({**Toy().record(), "torch": "1.0"}))
    assert Toy().prebuilt() is None


@pytest.mark.parametrize(
    "variable, value, message",
    [
        ("CXX", "no-such-compiler", r"toy: no C\+\+ compiler: 'no-such-compiler'"),
        ("TORCH_EXTENSIONS_DIR", __file__, "toy: cannot write to"),
    ],
)
def test_says_what_is_missing(toy, monkeypatch, variable, value, message):
    monkeypatch.setattr(shared, "ROOT", toy)
    monkeypatch.setenv(variable, value)
    with pytest.raises(RuntimeError, match=message):
        Toy().load()


def test_says_that_headers_are_missing(toy, monkeypatch):
    monkeypatch.setattr(shared, "ROOT", toy)
    monkeypatch.setattr(shared.sysconfig, "get_path", lambda name: str(toy / "no" / name))
    monkeypatch.setattr(shared, "_ninja_directory", lambda: None)
    with pytest.raises(RuntimeError, match=r"toy: no Python headers: .*Python.h does not exist.*; no ninja"):
        Toy().load()


def test_build_directory_compares_contents(tmp_path):
    source = tmp_path / "source.cpp"
    source.write_text("1")
    directory = BuildDirectory(tmp_path / "cache", "toy")
    with directory.locked("waiting"):
        assert not directory.is_current([source])
        with directory.rebuilding([source]):
            directory.library.touch()
        assert directory.is_current([source])
        os.utime(source)
        assert directory.is_current([source]), "a new time alone is no edit"
        source.write_text("2")
        assert not directory.is_current([source])
        with pytest.raises(KeyError), directory.rebuilding([source]):
            raise KeyError("the build failed")
        assert not directory.is_current([source]), "a failed build leaves no stamp"


def test_digest_depends_on_names_and_contents(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_text("1")
    b.write_text("1")
    digests = {digest([a]), digest([b]), digest([a, b])}
    a.write_text("2")
    assert len(digests | {digest([a])}) == 4


@pytest.mark.parametrize("builder", [CPUBuilder, CUDABuilder], ids=["cpu", "cuda"])
def test_sources_exist_and_every_source_is_listed(builder):
    listed = set(builder().sources())
    directory = ROOT / "csrc" / builder.NAME.removeprefix("ds_fp6_")
    assert listed == {str(p.relative_to(ROOT)) for p in directory.iterdir() if p.suffix in (".cpp", ".cu")}


def test_builders_are_deepspeeds_without_importing_deepspeed():
    code = (
        "import sys, ds_fp6.op_builder as o\n"
        "upstream = [c.__name__ for c in o.CPUBuilder.__mro__ + o.CUDABuilder.__mro__]\n"
        "o.CPUBuilder().build_directory()\n"
        "print('OpBuilder' in upstream, 'CUDAOpBuilder' in upstream, 'deepspeed' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["True", "True", "False"]


def test_deepspeed_does_not_take_the_checkouts_op_builder_for_its_own():
    code = (
        "import sys\ntry:\n    from op_builder import __deepspeed__\nexcept ImportError:\n    print('not DeepSpeed')\n"
        "print(sorted(name for name in sys.modules if name.startswith(('op_builder', 'torch'))))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.splitlines() == ["not DeepSpeed", "['op_builder']"]


@pytest.mark.parametrize(
    "named, expected",
    [
        ("9.0", ["9.0a"]),
        ("9.0a", ["9.0a"]),
        ("9.0+PTX", ["9.0a"]),
        ("9.0;9.0a 9.0+PTX", ["9.0a"]),
        ("7.5;8.0", ["8.0"]),
        ("8.6+PTX 8.0", ["8.0", "8.6+PTX"]),
        ("Ampere;Hopper", ["8.0", "8.6+PTX", "9.0a"]),
        ("10.0a;12.0", ["10.0a", "12.0"]),
    ],
)
def test_architectures(monkeypatch, named, expected):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", named)
    assert [str(a) for a in CUDABuilder().architectures()] == expected
    assert os.environ["TORCH_CUDA_ARCH_LIST"] == named


def test_architecture_flags(monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0+PTX;9.0a")
    assert CUDABuilder().compute_capability_args() == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_80,code=compute_80",
        "-gencode=arch=compute_90a,code=sm_90a",
    ]


@pytest.mark.parametrize("named, error", [("7.0;7.5", RuntimeError), ("nine", ValueError), ("9.0b", ValueError)])
def test_architectures_that_cannot_be(monkeypatch, named, error):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", named)
    with pytest.raises(error, match=named.split(";")[0]):
        CUDABuilder().architectures()


@pytest.mark.parametrize(
    "built, gpu, fits",
    [(["8.0"], (8, 6), True), (["8.0"], (9, 0), False), (["8.0+PTX"], (12, 0), True), (["9.0a"], (10, 0), False)],
)
def test_prebuilt_kernels_must_run_on_the_gpus_that_are_there(monkeypatch, built, gpu, fits):
    monkeypatch.setattr("ds_fp6.op_builder.cuda._capabilities", lambda: [gpu])
    builder = CUDABuilder()
    assert builder.fits({**builder.fingerprint(), "architectures": built}) is fits


def test_architectures_without_code_for_a_gpu_are_refused_before_the_build(monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr("ds_fp6.op_builder.cuda._capabilities", lambda: [(9, 0)])
    assert any("code for 8.0 does not run on compute capability 9.0" in lacking for lacking in CUDABuilder().missing())


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_torch_without_cuda_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"ds_fp6_cuda: torch .* is built without CUDA"):
        CUDABuilder().load()


#: Runs setup.py as a build environment without torch would.
SETUP_WITHOUT_TORCH = """
import runpy, sys
class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "deepspeed"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, NoTorch())
sys.argv = ["setup.py", "--name", "--version"]
runpy.run_path("setup.py", run_name="__main__")
"""


@pytest.mark.parametrize("ahead", [False, True])
def test_setup_needs_torch_only_to_build_ahead_of_time(ahead):
    environment = {**os.environ, "DS_BUILD_FP6": str(int(ahead))}
    command = [sys.executable, "-c", SETUP_WITHOUT_TORCH]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    if ahead:
        assert done.returncode != 0 and "DS_BUILD_FP6=1 compiles against torch" in done.stderr
    else:
        assert done.stdout.split()[-2:] == ["ds-fp6", "0.1.0"], done.stderr
