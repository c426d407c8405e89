"""The kernels of attention and argmax compile for every architecture, into what it has. No GPU is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed: torch's CPU builds leave it out")

ROOT = Path(__file__).parent.parent

#: Bytes of shared memory that a block can have, by compute capability.
SHARED = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10}


@pytest.fixture(scope="module")
def compiling(tmp_path_factory):
    """A process for each capability, side by side, and the files that take what it prints and its errors."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *sys.path])
    folder, running = tmp_path_factory.mktemp("compiled"), {}
    for capability in SHARED:
        printed, errors = folder / f"{capability}.json", folder / f"{capability}.log"
        with printed.open("w") as out, errors.open("w") as err:
            command = [sys.executable, str(ROOT / "tests" / "compile_attention.py"), str(capability)]
            running[capability] = subprocess.Popen(command, stdout=out, stderr=err, env=environment), printed, errors
    yield running
    for process, *_ in running.values():
        process.kill()
        process.wait()


@pytest.mark.parametrize("capability", SHARED)
def test_kernels_fit(compiling, capability):
    process, printed, errors = compiling[capability]
    assert process.wait(timeout=280) == 0, errors.read_text()[-3000:]
    found = json.loads(printed.read_text())
    assert len(found) == 15
    for kernel, usage in found.items():
        assert usage["shared"] <= SHARED[capability], kernel
        if capability == 90 and " 256" not in kernel:
            # The decode kernel's rotary embedding reduces large angles in an array of a few words.
            assert usage["stack"] <= (32 if kernel.startswith("decode") else 0), f"{kernel} spills"
