"""What the engine cannot run, said by name before a checkpoint is read.

DeepSpeed meets most of these only while it builds a model, as an assertion or as "Config … is not supported", and
some not at all: the model then runs and computes something else.
"""

from __future__ import annotations

from ds_fp6.integrations.deepspeed import attention, models, rotary
from ds_fp6.triton_ops import limits

FAMILIES = (
    "exaone4", "exaone4_5", "falcon", "llama", "mistral", "mixtral", "opt", "phi", "phi3", "qwen", "qwen2", "qwen2_moe",
)  # fmt: skip

#: What DeepSpeed's CUDA operators were compiled for.
CUDA_HEAD_RATIOS = (1, 2, 4, 5, 6, 7, 8, 16, 29, 35, 36, 71)
CUDA_HEAD_SIZES = (64, 80, 96, 128)
CUDA_WIDTH, CUDA_VOCABULARY = 8, 8


def _problems(config, cpu: bool, ranks: int) -> list[str]:
    problems = _architecture_problems(config)
    rotary_problem = rotary.problem(config, rotary.can_scale(cpu))
    if rotary_problem:
        problems.append(rotary_problem)
    q_heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or q_heads
    if config.model_type == "falcon":
        one = config.multi_query and not config.new_decoder_architecture
        kv_heads = 1 if one else config.num_kv_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // q_heads
    if q_heads % kv_heads:
        problems.append(f"{q_heads} query heads are no multiple of {kv_heads} key/value heads")
    if ranks > 1 and kv_heads % ranks and ranks % kv_heads:
        problems.append(f"{kv_heads} key/value heads cannot be split over {ranks} ranks")
    if config.vocab_size % ranks:
        problems.append(f"a vocabulary of {config.vocab_size} cannot be split over {ranks} ranks")
    if not cpu:
        problems += _head_problems(q_heads, kv_heads, head_size) + _cuda_problems(config, ranks)
    return problems


def _head_problems(q_heads: int, kv_heads: int, head_size: int) -> list[str]:
    if attention.chosen(cpu=False)[0] == "triton":
        problem = limits.problem(q_heads, kv_heads, head_size)
        return [problem] if problem else []
    problems, ratio = [], q_heads // kv_heads
    if ratio not in CUDA_HEAD_RATIOS:
        problems.append(f"{ratio} query heads per key/value head; DeepSpeed's kernels take {CUDA_HEAD_RATIOS}")
    if head_size not in CUDA_HEAD_SIZES:
        problems.append(f"a head size of {head_size}; DeepSpeed's kernels take {CUDA_HEAD_SIZES}")
    return problems


def _cuda_problems(config, ranks: int) -> list[str]:
    problems = []
    for name in ("intermediate_size", "ffn_dim"):
        width = getattr(config, name, None)
        if width is not None and width % (CUDA_WIDTH * ranks):
            problems.append(f"{name} = {width} is no multiple of {CUDA_WIDTH * ranks}, as DeepSpeed's kernels need")
    if config.vocab_size % CUDA_VOCABULARY:
        problems.append(f"a vocabulary of {config.vocab_size} is no multiple of {CUDA_VOCABULARY}")
    return problems


def _architecture_problems(config) -> list[str]:
    """Settings of a family that its model class takes no notice of."""
    problems, family = [], config.model_type
    if family == "falcon":
        if getattr(config, "alibi", False):
            problems.append("alibi: the engine computes rotary embeddings only")
        if not config.parallel_attn and not config.new_decoder_architecture:
            problems.append("parallel_attn = False")
        if config.bias:
            problems.append("bias = True")
    if family == "opt":
        if not config.do_layer_norm_before:
            problems.append("do_layer_norm_before = False (OPT-350m)")
        if models.activation_name(config) != "relu":
            problems.append(f"activation_function = {models.activation_name(config)!r}; the engine computes ReLU")
        if config.word_embed_proj_dim != config.hidden_size:
            problems.append(f"word_embed_proj_dim {config.word_embed_proj_dim} differs from {config.hidden_size}")
    if family == "phi" and getattr(config, "qk_layernorm", False):
        problems.append("qk_layernorm = True")
    if family == "qwen2_moe":
        if config.shared_expert_intermediate_size != config.moe_intermediate_size * config.num_experts_per_tok:
            problems.append(
                f"shared_expert_intermediate_size {config.shared_expert_intermediate_size} is not "
                f"num_experts_per_tok · moe_intermediate_size = "
                f"{config.num_experts_per_tok} · {config.moe_intermediate_size}"
            )
        if config.decoder_sparse_step != 1 or config.mlp_only_layers:
            problems.append("layers without experts (decoder_sparse_step, mlp_only_layers)")
    for name in ("attention_bias", "mlp_bias"):
        if family in ("llama", "mistral") and getattr(config, name, False):
            problems.append(f"{name} = True")
    return problems


def check(config, cpu: bool, ranks: int) -> None:
    """Raises ``ValueError`` that names what the engine cannot do with a transformers config.

    ``cpu``: whether it will run on a CPU, whose operators have fewer limits; ``ranks``: tensor parallelism.
    """
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"model type {config.model_type!r} is not supported by DeepSpeed-FastGen, which runs {', '.join(FAMILIES)}"
        )
    if config.model_type in ("qwen", "exaone4_5"):
        return
    problems = _problems(config, cpu, ranks)
    if problems:
        raise ValueError(f"this {config.model_type} model is not supported: {'; '.join(problems)}")
