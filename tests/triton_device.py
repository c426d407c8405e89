"""Where tests run Triton's kernels: on the GPU, or without one on the CPU in Triton's interpreter.

To be imported before the kernels are. Skips the importing module where there is no Triton.
"""

from __future__ import annotations

import os

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

if DEVICE == "cpu":
    # Read when a kernel is decorated.
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton", reason="triton is not installed: torch's CPU builds leave it out")


def _accept_numpy_2_4() -> None:
    """The interpreter takes integers from arrays of one element by ``int``, which numpy 2.4 refuses."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


if DEVICE == "cpu":
    _accept_numpy_2_4()

#: The interpreter multiplies bfloat16 matrices by their bits.
DTYPES = [torch.float16] if DEVICE == "cpu" else [torch.float16, torch.bfloat16]
