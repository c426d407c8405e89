"""The kernels of attention and argmax compile for every architecture, into what it has. No GPU is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import ahead
import pytest

pytest.importorskip("triton", reason="triton is not installed: torch's CPU builds leave it out")

ROOT = Path(__file__).parent.parent

#: Bytes of shared memory that a block can have, by compute capability.
SHARED = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10}


def compiled(_: Path, capability: int) -> subprocess.CompletedProcess:
    """In a process without Triton's interpreter, which other tests turn on."""
    environment = {name: value for name, value in ahead.ENVIRONMENT.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *sys.path])
    return ahead.run(sys.executable, ROOT / "tests" / "compile_attention.py", capability, env=environment)


@ahead.made_by(compiled)
@pytest.mark.parametrize("capability", SHARED)
def test_kernels_fit(made, capability):
    assert made.returncode == 0, made.stderr[-3000:]
    found = json.loads(made.stdout)
    assert len(found) == 15
    for kernel, usage in found.items():
        assert usage["shared"] <= SHARED[capability], kernel
        if capability == 90 and " 256" not in kernel:
            # The decode kernel's rotary embedding reduces large angles in an array of a few words.
            assert usage["stack"] <= (32 if kernel.startswith("decode") else 0), f"{kernel} spills"
