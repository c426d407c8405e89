"""Tokenizers and dense models of transformers, for comparisons with FastGen's engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ds_fp6.formats import Mode
from ds_fp6.weight import PackedWeight

#: Modules of a causal language model that stay in 16 bits: everything outside its stack of layers.
LAYERS = ("layers", "h", "blocks")


def encode(model: str | Path, text: str) -> torch.Tensor:
    """The token ids of ``text``, int64 [n], by the tokenizer of the checkpoint and without special tokens."""
    tokenizer = AutoTokenizer.from_pretrained(str(model))
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids, dtype=torch.int64)


def load_rounded(
    model: str | Path, mode: str | None, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> tuple[Any, int]:
    """A transformers model whose linear layers hold what ``mode`` makes of the checkpoint's weights.

    Each matrix of the transformer layers is quantized from the checkpoint's own dtype and dequantized to
    ``dtype``; embedding, LM head, norms and biases are only cast. ``mode`` None leaves every weight as it is.

    Returns: the model in eval mode, and the bytes that its parameters take in a quantized checkpoint: packed codes
    and scales of the matrices, the checkpoint's dtype for the rest.
    Raises: ``ValueError`` for an unknown mode, or where the model has no stack of layers to quantize.
    """
    parsed = None if mode is None else Mode.parse(mode)
    dense = AutoModelForCausalLM.from_pretrained(str(model), dtype="auto")
    own = getattr(dense.config, "dtype", None) or dense.dtype
    packed_bytes, matrices = 0, set()
    if parsed is not None:
        linears = [
            module for name, module in dense.named_modules()
            if isinstance(module, torch.nn.Linear) and any(part in LAYERS for part in name.split("."))
        ]  # fmt: skip
        if not linears:
            raise ValueError(f"found no linear layers in the stack of layers of {type(dense).__name__}")
        for module in linears:
            packed = PackedWeight.from_dense(module.weight.detach(), parsed)
            packed_bytes += packed.nbytes
            module.weight = torch.nn.Parameter(packed.dequantize(dtype), requires_grad=False)
            matrices.add(id(module.weight))
    rest = sum(p.numel() * own.itemsize for p in dense.parameters() if id(p) not in matrices)
    return dense.to(device=device, dtype=dtype).eval(), packed_bytes + rest


@torch.inference_mode()
def continue_greedily(model: str | Path, prompts: Sequence[str], new_tokens: int, mode: str | None = None) -> list[str]:
    """What the model of ``load_rounded`` writes after each prompt, in fp32 and without stopping at end of text."""
    tokenizer = AutoTokenizer.from_pretrained(str(model))
    rounded, _ = load_rounded(model, mode)
    written = []
    for prompt in prompts:
        ids = torch.tensor([tokenizer(prompt, add_special_tokens=False).input_ids])
        out = rounded.generate(
            ids, attention_mask=torch.ones_like(ids), min_new_tokens=new_tokens, max_new_tokens=new_tokens,
            do_sample=False, pad_token_id=0,
        )  # fmt: skip
        written.append(tokenizer.decode(out[0, ids.shape[1] :]))
    return written
