"""The GPU layout's bit maps and the dequantization from them, for every code of every format. Needs no GPU."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from ds_fp6.formats import all_formats

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler: c++ is not on PATH")
def test_every_code_of_every_format_comes_out_of_its_words(tmp_path: Path) -> None:
    program = tmp_path / "check_layout"
    source = ROOT / "tests" / "cpp" / "check_layout.cpp"
    subprocess.run(
        ["c++", "-std=c++17", "-O1", "-Wall", "-Werror", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'cuda'}",
         str(source), "-o", str(program)],
        check=True,
    )
    result = subprocess.run([str(program)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.split() == [fmt.name for fmt in all_formats()]
