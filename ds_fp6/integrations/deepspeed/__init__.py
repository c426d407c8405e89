"""DeepSpeed's hooks: its accelerator, and its inference engine FastGen (``deepspeed.inference.v2``).

``install`` is called after ``import deepspeed``. The engine is imported by DeepSpeed when it is first asked for,
so its hooks wait for that.
"""

from __future__ import annotations

import threading

from ds_fp6.integrations import versions
from ds_fp6.integrations.patching import Hook, Repair

_lock = threading.Lock()
_installed = False

#: What the hooks of this package repair, as ``ds-fp6 env`` lists it.
REPAIRS = (
    Repair("cuda-architectures", "DeepSpeed's builders died on entries of TORCH_CUDA_ARCH_LIST such as 9.0a"),
    Repair("activation-dtype", "qwen2 and qwen2-moe ran in fp16 whatever the checkpoint says"),
    Repair("norm-epsilon", "norms used epsilon 1e-5 instead of the checkpoint's"),
    Repair("rotary", "partial_rotary_factor and falcon's rope_theta were not read; CPU: fp32 frequencies throughout"),
    Repair("rope-scaling", "linear, llama3 and yarn rotary scaling was refused (not with DeepSpeed's attention)"),
    Repair("exact-gelu", "models trained with the exact GELU ran with its tanh approximation (CPU)"),
    Repair("sliding-window", "models with a sliding window attended to everything (not with DeepSpeed's attention)"),
    Repair("head-dim", "head_dim in config.json was ignored"),
    Repair("sizes", "head ratios, head sizes, intermediate and vocabulary sizes were refused (CPU)"),
    Repair("config-checks", "settings that the engine would ignore are refused before the checkpoint is read"),
    Repair("attention-atoms", "long prompts overran the atom buffer when max_ragged_sequence_count was small"),
    Repair("put-checks", "InferenceEngineV2.put(do_checks=True) and can_schedule raised TypeError"),
    Repair("batch-buffers", "two puts with nothing read between them raced on pinned host buffers and on the logits"),
    Repair("single-process", "build_hf_engine without a launcher asked for mpi4py"),
    Repair("load-memory", "loading read whole shards, and copied the model once more into one buffer"),
    Repair("tied-embeddings", "tied embeddings loaded for qwen2 only; an untied OPT lost its LM head"),
    Repair("load-errors", "missing, damaged and ill-fitting checkpoints were looked for on the hub or asserted"),
    Repair("buffer-cache", "the buffers of every engine ever built stayed in memory"),
    Repair("kv-memory", "the KV cache took all memory of the machine, in every rank (CPU)"),
)


def hooks() -> tuple[Hook, ...]:
    """Every place of DeepSpeed that is hooked, in the order of installation."""
    return _startup_hooks() + _engine_hooks()


def _startup_hooks() -> tuple[Hook, ...]:
    from ds_fp6.integrations.deepspeed import accelerator, architectures

    return accelerator.HOOKS + architectures.HOOKS


def _engine_hooks() -> tuple[Hook, ...]:
    from ds_fp6.integrations import checkpoint, load_format
    from ds_fp6.integrations.deepspeed import (
        attention, batch, engine, graphs, kernels, models, pointwise, quantization,
    )  # fmt: skip

    loading = Hook("deepspeed.inference.v2.checkpoint", "reads checkpoints tensor by tensor", checkpoint.install)
    modules = (load_format, engine, batch, attention, graphs, kernels, pointwise, models, quantization)
    return (loading, *(hook for module in modules for hook in module.HOOKS))


def install() -> None:
    """Hooks DeepSpeed. Idempotent. Raises ``UnsupportedVersion`` for a version that is not supported."""
    global _installed
    import deepspeed  # noqa: F401  (its own post-import hook may come here first, so before the lock is taken)

    with _lock:
        if _installed:
            return
        versions.check("deepspeed", "transformers")
        import wrapt

        for hook in _startup_hooks():
            hook.apply()
        _installed = True
        wrapt.register_post_import_hook(_install_engine, "deepspeed.inference.v2")


def _install_engine(_module: object) -> None:
    for hook in _engine_hooks():
        hook.apply()
