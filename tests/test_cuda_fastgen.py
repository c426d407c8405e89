"""FastGen on a GPU: the shipped model writes what it writes on a CPU, by the engine and through MII."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
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


def run(program: str, model: Path, mode: str, device: str):
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / program), str(model), mode, str(NEW_TOKENS)],
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


class OnCpu:
    """What the CPU writes with a checkpoint, by the engine, and how far the likeliest token is ahead each time."""

    def __init__(self, dtype: torch.dtype, mode: str, directory: Path) -> None:
        self.model, self.mode = checkpoint_in(dtype, directory), mode
        self._tie = TIE[str(dtype).removeprefix("torch.")]
        found = run("greedy.py", self.model, mode, "cpu")
        self.tokens, self._margins = found["tokens"], found["margins"]

    def compare(self, equal: list[int]) -> None:
        """``equal``: of each prompt, with how many of the CPU's tokens a GPU's begin."""
        flips = []
        for prompt, first, margins in zip(PROMPTS, equal, self._margins, strict=True):
            apart = f", margin {margins[first]:.4f}" if first < NEW_TOKENS else ""
            print(f"{prompt!r}: {first} of {NEW_TOKENS} tokens equal{apart}")
            if first < EQUAL_TOKENS:
                flips.append((prompt, first, margins[first]))
        unexplained = [flip for flip in flips if flip[2] > self._tie]
        assert not unexplained, f"(prompt, token, logit margin) of tokens that differ: {unexplained}"


@pytest.fixture(
    scope="module", params=[(torch.float16, "wf6af16"), (torch.bfloat16, "wf6a16")], ids=["fp16", "bf16"]
)
def on_cpu(request, tmp_path_factory) -> OnCpu:
    return OnCpu(*request.param, tmp_path_factory.mktemp("model"))


def test_greedy_tokens_are_the_cpus(on_cpu):
    tokens = run("greedy.py", on_cpu.model, on_cpu.mode, "cuda")["tokens"]
    assert [len(ours) for ours in tokens] == [NEW_TOKENS] * len(PROMPTS)
    on_cpu.compare([leading(lambda i: ours[i] == theirs[i]) for ours, theirs in zip(tokens, on_cpu.tokens, strict=True)])


def test_pipelines_text_is_the_cpus(on_cpu):
    """``mii.pipeline`` on the GPU; a text has no tokens, so it is compared with that of each number of the CPU's."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(on_cpu.model)
    texts = run("pipeline_text.py", on_cpu.model, on_cpu.mode, "cuda")
    equal = []
    for text, theirs in zip(texts, on_cpu.tokens, strict=True):
        if text == tokenizer.decode(theirs):
            equal.append(NEW_TOKENS)
        else:
            equal.append(leading(lambda i: text.startswith(tokenizer.decode(theirs[: i + 1]))))
    on_cpu.compare(equal)


def leading(is_equal: Callable[[int], bool]) -> int:
    """How many of the tokens from the first on are equal."""
    return next((i for i in range(NEW_TOKENS) if not is_equal(i)), NEW_TOKENS)
