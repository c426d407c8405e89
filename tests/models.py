"""Tiny random checkpoints of every model family that FastGen runs, written as Hugging Face writes them."""

from __future__ import annotations

from pathlib import Path

import torch

#: One token a byte, and two special tokens. No multiple of 8, which DeepSpeed's CUDA operators would want.
BOS, EOS = 256, 257
VOCABULARY = 258

_SIZES = dict(
    vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=2048, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=EOS, tie_word_embeddings=False,
)  # fmt: skip
_GQA = dict(_SIZES, num_key_value_heads=2, intermediate_size=112, rms_norm_eps=1e-6)
_WINDOW = dict(sliding_window=None)

#: Name → (transformers' model type, its config). Head size 16 unless a config names another.
FAMILIES: dict[str, tuple[str, dict]] = {
    "llama": ("llama", dict(_GQA, num_key_value_heads=4)),
    "llama_gqa": ("llama", dict(_GQA, head_dim=32)),
    "llama_tied": ("llama", dict(_GQA, tie_word_embeddings=True)),
    "llama_rope3": (
        "llama",
        dict(_GQA, rope_parameters=dict(
            rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=64,
        )),
    ),
    "llama_yarn": (
        "llama",
        dict(_GQA, rope_parameters=dict(
            rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=64,
        )),
    ),
    "mistral": ("mistral", dict(_GQA, sliding_window=48)),
    "opt": ("opt", dict(_SIZES, ffn_dim=100, word_embed_proj_dim=64, dropout=0.0)),
    "falcon": ("falcon", dict(_SIZES, alibi=False, multi_query=True, parallel_attn=True)),
    "falcon_new": ("falcon", dict(_SIZES, alibi=False, new_decoder_architecture=True, num_kv_heads=2)),
    "phi": ("phi", dict(_SIZES, intermediate_size=120, partial_rotary_factor=0.5)),
    "phi3": ("phi3", dict(_GQA, **_WINDOW)),
    "qwen2": ("qwen2", dict(_GQA, **_WINDOW)),
    "mixtral": ("mixtral", dict(_GQA, num_local_experts=4, num_experts_per_tok=2, **_WINDOW)),
    "qwen2_moe": (
        "qwen2_moe",
        dict(
            _GQA, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, norm_topk_prob=False,
            shared_expert_intermediate_size=48, decoder_sparse_step=1, mlp_only_layers=[], **_WINDOW,
        ),
    ),
}  # fmt: skip


def tokenizer():
    """A tokenizer of single bytes."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(letters)} | {"<s>": BOS, "</s>": EOS}
    tok = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tok.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def build(family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes) -> torch.nn.Module:
    """A random transformers model of a family, whose weights are large enough to tell its tokens apart."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, settings = FAMILIES[family]
    config = AutoConfig.for_model(model_type, **{**settings, **changes})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in dict.fromkeys(model.parameters()):
            if parameter.dim() > 1:
                parameter.normal_(std=1.5 * parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.to(dtype)


def save(model: torch.nn.Module, path: Path) -> str:
    """Writes model and tokenizer into ``path`` and returns it as MII wants it."""
    model.save_pretrained(path)
    tokenizer().save_pretrained(path)
    return str(path)


#: Linear layers that stay in 16 bits: the LM head, and the gates of experts.
DENSE = ("lm_head", "mlp.gate", "block_sparse_moe.gate", "shared_expert_gate")


def quantize_(model: torch.nn.Module, mode: str) -> torch.nn.Module:
    """Replaces in place what FastGen quantizes under ``mode`` by its dequantized value.

    FastGen fuses q, k and v, and gate and up, before it quantizes; scales belong to output channels or groups
    within them, so quantizing each matrix by itself gives the same.
    """
    from ds_fp6 import PackedWeight

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and not name.endswith(DENSE):
            weight = module.weight.data
            weight.copy_(PackedWeight.from_dense(weight, mode).dequantize(weight.dtype))
    return model


def greedy(model: torch.nn.Module, prompt: torch.Tensor, new_tokens: int) -> list[int]:
    """transformers' greedy continuation of one prompt of token ids."""
    output = model.generate(
        prompt.unsqueeze(0), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), do_sample=False,
        max_new_tokens=new_tokens, min_new_tokens=new_tokens, pad_token_id=EOS, eos_token_id=None,
    )  # fmt: skip
    return output[0, len(prompt) :].tolist()


def random_prompts(*lengths: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (length,), generator=generator) for length in lengths]


def number_tokenizer():
    """A tokenizer whose text is token ids in decimal, so that a test sees exactly the tokens that MII saw."""
    from mii.modeling.tokenizers import MIITokenizerWrapper

    class Numbers(MIITokenizerWrapper):
        vocab_size = VOCABULARY
        eos_token_id = EOS

        def __init__(self) -> None:
            super().__init__(self)

        def __len__(self) -> int:
            return VOCABULARY

        def encode(self, text: str, **kwargs) -> torch.Tensor:
            return torch.tensor([int(word) for word in text.split()], dtype=torch.int64)

        def decode(self, tokens) -> str:
            return " ".join(str(int(token)) for token in tokens)

    return Numbers()
