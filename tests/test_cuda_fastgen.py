"""FastGen on a GPU: the shipped model writes what it writes on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "examples" / "tiny-python-llama"
PROMPTS = [
    "def main(", "import os\n\n", "class Stack:\n    def __init__(self", "for i in range(", "try:\n    import ",
    "def read_file(path):\n    with open(", "from typing import ", "if __name__ == ", "    return [", "@property\ndef ",
]  # fmt: skip
NEW_TOKENS, EQUAL_TOKENS = 64, 32

#: Two devices add the same products in another order; where the two likeliest tokens lie closer together than this,
#: in units of the logits, either may win. Each 16-bit type rounds the logits, of magnitude 8 to 16, to this step.
TIE = {"float16": 2**-6, "bfloat16": 2**-3}


def greedy(model: Path, mode: str, device: str) -> dict:
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "greedy.py"), str(model), mode, str(NEW_TOKENS)],
        input=json.dumps(PROMPTS), capture_output=True, text=True, env=environment, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def checkpoint_in(dtype: torch.dtype, directory: Path) -> Path:
    """The shipped checkpoint converted to ``dtype``."""
    from safetensors.torch import load_file, save_file

    for path in MODEL.iterdir():
        if path.suffix == ".json":
            (directory / path.name).write_text(path.read_text())
    config = json.loads((MODEL / "config.json").read_text())
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    (directory / "config.json").write_text(json.dumps(config))
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(MODEL / "model.safetensors").items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.mark.parametrize("dtype, mode", [(torch.float16, "wf6af16"), (torch.bfloat16, "wf6a16")], ids=["fp16", "bf16"])
def test_greedy_text_is_the_cpus(dtype, mode, tmp_path):
    model = checkpoint_in(dtype, tmp_path)
    on_gpu, on_cpu = greedy(model, mode, "cuda"), greedy(model, mode, "cpu")
    flips = []
    for prompt, ours, theirs, margins in zip(
        PROMPTS, on_gpu["tokens"], on_cpu["tokens"], on_cpu["margins"], strict=True
    ):
        assert len(ours) == len(theirs) == NEW_TOKENS
        first = next((i for i in range(NEW_TOKENS) if ours[i] != theirs[i]), NEW_TOKENS)
        print(f"{prompt!r}: {first} of {NEW_TOKENS} tokens equal" + (f", margin {margins[first]:.4f}" if first < NEW_TOKENS else ""))
        if first < EQUAL_TOKENS:
            flips.append((prompt, first, margins[first]))
    unexplained = [flip for flip in flips if flip[2] > TIE[str(dtype).removeprefix("torch.")]]
    assert not unexplained, f"(prompt, token, logit margin) of tokens that differ: {unexplained}"
