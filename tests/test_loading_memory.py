"""Anonymous memory while a checkpoint of several hundred MB loads, measured in a process of its own."""

from __future__ import annotations

import gc
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

MIB = 2**20

#: A llama of few wide layers, and a small one that warms the process up.
BIG = dict(hidden=2048, inner=8192, layers=3, vocabulary=8000)
SMALL = dict(hidden=256, inner=512, layers=1, vocabulary=256)
HEAD, QUERIES_PER_KEY = 64, 4

#: What loading may take beyond the model and one layer in 16 bits. The requirement is 200 MiB; with a model this
#: small, that would hide a second copy of it.
SLACK = 64 * MIB


def tensors_of(hidden: int, inner: int, layers: int, vocabulary: int) -> list[dict[str, tuple[int, ...]]]:
    """Shapes by name: the outer tensors first, then each layer's."""
    key_value = hidden // QUERIES_PER_KEY
    outer = {"model.embed_tokens.weight": (vocabulary, hidden), "lm_head.weight": (vocabulary, hidden)}
    layer = {
        "self_attn.q_proj.weight": (hidden, hidden), "self_attn.k_proj.weight": (key_value, hidden),
        "self_attn.v_proj.weight": (key_value, hidden), "self_attn.o_proj.weight": (hidden, hidden),
        "mlp.gate_proj.weight": (inner, hidden), "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner), "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }  # fmt: skip
    return [outer | {"model.norm.weight": (hidden,)}] + [
        {f"model.layers.{i}.{name}": shape for name, shape in layer.items()} for i in range(layers)
    ]


def largest_layer_bytes() -> int:
    layers = tensors_of(**BIG)[1:]
    return max(sum(2 * torch.Size(shape).numel() for shape in layer.values()) for layer in layers)


def write(path: Path, kind: str, hidden: int, inner: int, layers: int, vocabulary: int) -> Path:
    """A random bf16 checkpoint in shards of one layer, as safetensors or PyTorch files."""
    from safetensors.torch import save_file

    path.mkdir()
    noise = torch.randn(inner * hidden + vocabulary * hidden, dtype=torch.bfloat16) * 0.02
    index, suffix = ("model.safetensors", "safetensors") if kind == "safetensors" else ("pytorch_model.bin", "bin")
    weight_map = {}
    for i, shapes in enumerate(tensors_of(hidden, inner, layers, vocabulary)):
        shard = {
            name: noise[: torch.Size(shape).numel()].view(shape).clone() if len(shape) > 1 else noise.new_ones(shape)
            for name, shape in shapes.items()
        }
        file = f"weights-{i}.{suffix}"
        save_file(shard, path / file) if kind == "safetensors" else torch.save(shard, path / file)
        weight_map |= dict.fromkeys(shard, file)
    (path / f"{index}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = dict(
        model_type="llama", hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=hidden // HEAD, num_key_value_heads=hidden // HEAD // QUERIES_PER_KEY,
        vocab_size=vocabulary, max_position_embeddings=512, torch_dtype="bfloat16", tie_word_embeddings=False,
    )  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    made = {}

    def make(kind: str) -> tuple[Path, Path]:
        if kind not in made:
            root = tmp_path_factory.mktemp(kind)
            made[kind] = write(root / "small", kind, **SMALL), write(root / "big", kind, **BIG)
        return made[kind]

    return make


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="anonymous memory is read from /proc")
@pytest.mark.parametrize("kind, mode", [("safetensors", None), ("safetensors", "wf6abf16"), ("bin", "wf6abf16")])
def test_loading_takes_the_model_and_a_layer(checkpoint, kind, mode):
    small, big = checkpoint(kind)
    command = [sys.executable, __file__, str(small), str(big), mode or ""]
    child = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert child.returncode == 0, child.stderr
    measured = json.loads(child.stdout.splitlines()[-1])
    bits = 16 if mode is None else 6
    linear = sum(torch.Size(s).numel() for layer in tensors_of(**BIG)[1:] for s in layer.values() if len(s) == 2)
    embeddings = sum(2 * torch.Size(s).numel() for s in tensors_of(**BIG)[0].values())
    # The model is what it should be: packed to the bit but for scales and norms.
    assert 0 <= measured["model"] - linear * bits // 8 - embeddings < MIB
    assert measured["growth"] <= measured["model"] + largest_layer_bytes() + SLACK


def anonymous_bytes() -> int:
    return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def measure(small: str, big: str, mode: str | None) -> dict[str, int]:
    """Bytes of the loaded parameters, and by how much the process's anonymous memory grew at most."""
    from ds_fp6.integrations.engine import build_engine

    state = dict(max_context=128, max_ragged_batch_size=32, max_ragged_sequence_count=2)
    state["memory_config"] = {"mode": "allocate", "size": 2}
    build_engine(small, mode, **state)
    gc.collect()
    before = peak = anonymous_bytes()
    done = threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, anonymous_bytes())
            time.sleep(0.001)

    sampler = threading.Thread(target=sample)
    sampler.start()
    engine = build_engine(big, mode, **state)
    done.set()
    sampler.join()
    model = engine.model()
    parameters = [
        getattr(container, name)
        for container in [*model._transformer, model._non_transformer]
        for name in container.annotation_attrs
    ]
    tensors = [tensor for parameter in parameters for tensor in (parameter, *parameter.aux_attrs.values())]
    return {"growth": max(peak, anonymous_bytes()) - before, "model": sum(tensor.nbytes for tensor in tensors)}


if __name__ == "__main__":
    os.environ.setdefault("TQDM_DISABLE", "1")
    print(json.dumps(measure(sys.argv[1], sys.argv[2], sys.argv[3] or None)))
