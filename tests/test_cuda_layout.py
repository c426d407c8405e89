"""The GPU layout's bit maps and the dequantization from them, for every code of every format. Needs no GPU."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import ahead
import pytest

from ds_fp6.formats import all_formats

ROOT = Path(__file__).parent.parent


def checked(folder: Path) -> subprocess.CompletedProcess:
    program = folder / "check_layout"
    source = ROOT / "tests" / "cpp" / "check_layout.cpp"
    compiler = ahead.run(
        "c++", "-std=c++17", "-O1", "-Wall", "-Werror", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'cuda'}",
        source, "-o", program,
    )  # fmt: skip
    assert compiler.returncode == 0, compiler.stderr
    return ahead.run(program)


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler: c++ is not on PATH")
@ahead.made_by(checked)
def test_every_code_of_every_format_comes_out_of_its_words(made: subprocess.CompletedProcess) -> None:
    assert made.returncode == 0, made.stdout + made.stderr
    assert made.stdout.split() == [fmt.name for fmt in all_formats()]
