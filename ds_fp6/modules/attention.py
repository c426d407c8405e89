"""Attention by Triton's kernels, registered with DeepSpeed's module registry."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.inference.v2.inference_utils import DtypeEnum
from deepspeed.inference.v2.modules.configs import DSSelfAttentionConfig, MaskingType, PositionalEmbeddingType
from deepspeed.inference.v2.modules.interfaces import DSSelfAttentionBase, DSSelfAttentionRegistry
from deepspeed.inference.v2.ragged import RaggedBatchWrapper

from ds_fp6.triton_ops import limits, plan


@DSSelfAttentionRegistry.register_module
class TritonAttention(DSSelfAttentionBase):
    """Rotary embedding, cache writes and causal attention over the blocked cache.

    Sequences with one new token take one launch for all of it, spread over the length of their cache. All others
    take two: rotary embedding and cache writes, then a kernel for many queries at a time. A batch's numbers of sequences
    and tokens and ``launches`` decide what is launched: a step can be captured and replayed.
    """

    @staticmethod
    def name() -> str:
        return "ds_fp6_triton_attention"

    @staticmethod
    def supports_config(config: DSSelfAttentionConfig) -> bool:
        return problem(config) is None

    def __init__(self, config: DSSelfAttentionConfig, implementation_config: dict[str, Any]) -> None:
        super().__init__(config, implementation_config)
        # Only here, where it is known that Triton is there.
        from ds_fp6.triton_ops.decode import DecodeWorkspace

        device = torch.device(get_accelerator().current_device())
        dtype = DtypeEnum(config.output_dtype).value
        self.softmax_scale: float = config.scale_factor
        #: Positions that a query sees, None for all of them.
        self.window: int | None = None
        #: fp32 [rotary dimensions / 2]: a pair's angle per position; None rotates nothing.
        self.frequencies = _frequencies(config, device)
        self._output = torch.empty(
            (config.max_tokens, config.n_heads_q * config.head_size), dtype=dtype, device=device
        )  # fmt: skip
        group = config.n_heads_q // config.n_heads_kv
        self._workspace = DecodeWorkspace(config.max_sequences, config.n_heads_kv, group, config.head_size, device)
        #: Mean positions of a batch's prompts from which on they are taken for long ones.
        self.long_prompt = plan.LONG_PROMPT
        self._has_single, self._has_several, self._is_long = True, True, False

    @property
    def kv_block_size(self) -> int:
        """Tokens in a block of the KV cache: what DeepSpeed's own kernels take for these head sizes."""
        return 128 if self._config.head_size <= 64 else 64

    @property
    def q_block_size(self) -> int:
        """DeepSpeed's unit of work; here kernels find their own."""
        return 128

    def build_atoms(self, ragged_batch: RaggedBatchWrapper) -> None:
        """Notes which of the kernels the batch needs, and for which lengths. There are no atoms to copy."""
        descriptors = ragged_batch.inflight_seq_descriptors(on_device=False)[: ragged_batch.current_sequences]
        several = descriptors[descriptors[:, 1] > 1]
        # Those that fill a batch up may have no token at all.
        self._has_single, self._has_several = bool((descriptors[:, 1] == 1).any()), len(several) > 0
        positions = int(several[:, 1:3].sum())
        self._is_long = self._has_several and positions >= self.long_prompt * len(several)

    @property
    def launches(self) -> tuple[bool, bool, bool]:
        """What the batch in hand launches, besides what its numbers of sequences and tokens say."""
        return self._has_single, self._has_several, self._is_long

    def forward(
        self, q_k_v: torch.Tensor, kv_cache: torch.Tensor, batch: RaggedBatchWrapper,
        inv_freqs: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """[n_tokens, (q_heads + 2 · kv_heads) · head_size] → [n_tokens, q_heads · head_size].

        ``kv_cache`` is one layer's, [blocks, block_size, 2, kv_heads, head_size], and gets the batch's keys and
        values; ``inv_freqs`` replaces the frequencies of the rotary embedding.
        """
        from ds_fp6.triton_ops.decode import decode_attention
        from ds_fp6.triton_ops.prefill import prefill_attention
        from ds_fp6.triton_ops.rotary import rotate_and_store

        config = self._config
        sequences, pointers = batch.inflight_seq_descriptors(), batch.kv_ptrs()
        frequencies = self.frequencies if inv_freqs is None else inv_freqs
        out = self._output[: len(q_k_v)]
        if self._has_single:
            decode_attention(
                out, q_k_v, kv_cache, frequencies, sequences, pointers,
                self.softmax_scale, self.window, self._workspace,
            )  # fmt: skip
        if self._has_several:
            rotate_and_store(
                q_k_v, kv_cache, frequencies,
                batch.batch_metadata_buffer(), sequences, batch.tokens_to_seq(), pointers,
            )  # fmt: skip
            prefill_attention(
                out, q_k_v[:, : config.n_heads_q * config.head_size], kv_cache, sequences, pointers,
                self.softmax_scale, self.window, config.max_sequences, self._is_long,
            )  # fmt: skip
        return out


def problem(config: DSSelfAttentionConfig) -> str | None:
    """Why the kernels cannot do what ``config`` asks for, None where they can."""
    dtype = DtypeEnum(config.input_dtype)
    if dtype not in (DtypeEnum.fp16, DtypeEnum.bf16) or DtypeEnum(config.output_dtype) is not dtype:
        return f"activations are {DtypeEnum(config.input_dtype).value} in, {DtypeEnum(config.output_dtype).value} out"
    embedding = PositionalEmbeddingType(config.positional_embedding_type)
    if embedding not in (PositionalEmbeddingType.none, PositionalEmbeddingType.rotate_half):
        return f"positional embeddings are {embedding.value}"
    if MaskingType(config.masking_type) is not MaskingType.causal:
        return f"masking is {config.masking_type}"
    return limits.problem(config.n_heads_q, config.n_heads_kv, config.head_size)


def _frequencies(config: DSSelfAttentionConfig, device: torch.device) -> torch.Tensor | None:
    """``theta^(-2i / rotary dimensions)`` in fp32, as transformers rounds it."""
    rotary = config.positional_embedding_config
    if PositionalEmbeddingType(config.positional_embedding_type) is PositionalEmbeddingType.none:
        return None
    if rotary.use_trained_freqs:
        return None
    dimensions = config.head_size if rotary.rotate_dim is None else rotary.rotate_dim
    exponents = torch.arange(0, dimensions, 2, dtype=torch.int64).float() / dimensions
    return (1.0 / rotary.theta_base**exponents).to(device)
