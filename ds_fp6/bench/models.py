"""The shapes of well-known models, by name: config.json contents and the linear layers they imply."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple


def _llama(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocab: int = 32000, **more) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": hidden,
        "intermediate_size": intermediate, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "vocab_size": vocab, "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "torch_dtype": "float16", "bos_token_id": 1,
        "eos_token_id": 2, **more,
    }  # fmt: skip


CONFIGS: dict[str, dict] = {
    "llama-2-7b": _llama(4096, 11008, 32, 32, 32),
    "llama-2-13b": _llama(5120, 13824, 40, 40, 40),
    "llama-2-70b": _llama(8192, 28672, 80, 64, 8),
    "llama-3-8b": _llama(4096, 14336, 32, 32, 8, vocab=128256, max_position_embeddings=8192, rope_theta=500000.0),
    "opt-30b": {
        "architectures": ["OPTForCausalLM"], "model_type": "opt", "activation_function": "relu",
        "do_layer_norm_before": True, "hidden_size": 7168, "word_embed_proj_dim": 7168, "ffn_dim": 28672,
        "num_hidden_layers": 48, "num_attention_heads": 56, "max_position_embeddings": 2048, "vocab_size": 50272,
        "torch_dtype": "float16", "bos_token_id": 2, "eos_token_id": 2,
    },
}  # fmt: skip


class LinearShape(NamedTuple):
    """``y[M, N] = x[M, K] · W[N, K]ᵀ``."""

    name: str
    n: int
    k: int


def config(model: str) -> dict:
    """The contents of config.json. Raises ``ValueError`` with the names there are."""
    if model not in CONFIGS:
        raise ValueError(f"unknown model {model!r}; known: {', '.join(CONFIGS)}")
    return CONFIGS[model]


def write_config(model: str, directory: str | Path) -> Path:
    """Writes ``directory/config.json``, all that dummy weights need, and returns the directory."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config(model), indent=2))
    return directory


def linear_shapes(model: str, tp: int = 1) -> list[LinearShape]:
    """The linear layers of one transformer block on one of ``tp`` ranks, fused as FastGen fuses them."""
    shape = config(model)
    hidden, heads = shape["hidden_size"], shape["num_attention_heads"]
    kv_heads = shape.get("num_key_value_heads", heads)
    if heads % tp:
        raise ValueError(f"{model} has {heads} heads, which {tp} ranks do not divide")
    head_dim, local_heads, local_kv_heads = hidden // heads, heads // tp, max(1, kv_heads // tp)
    layers = [
        LinearShape("qkv", (local_heads + 2 * local_kv_heads) * head_dim, hidden),
        LinearShape("o", hidden, local_heads * head_dim),
    ]
    if "intermediate_size" in shape:
        width = -(-shape["intermediate_size"] // tp)
        return [*layers, LinearShape("gate_up", 2 * width, hidden), LinearShape("down", hidden, width)]
    width = -(-shape["ffn_dim"] // tp)
    return [*layers, LinearShape("fc1", width, hidden), LinearShape("fc2", hidden, width)]
