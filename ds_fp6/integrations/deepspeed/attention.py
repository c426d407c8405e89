"""Which attention the engine runs on a GPU: Triton's kernels of this package, or DeepSpeed's own."""

from __future__ import annotations

from ds_fp6.integrations.deepspeed import triton_choice
from ds_fp6.integrations.deepspeed.accelerator import on_cpu
from ds_fp6.integrations.patching import Hook, wrap

#: ``triton`` or ``upstream``; unset is triton where it can be used.
VARIABLE = "DS_FP6_ATTENTION"


def chosen(cpu: bool) -> tuple[str, str]:
    """``triton`` or ``upstream``, and why. ``cpu``: whether the engine runs on a CPU.

    Raises ``ValueError`` for another value of the variable, or one that asks for what cannot be had.
    """
    return triton_choice.chosen(VARIABLE, cpu)


def _instantiate_attention(original, attention_config, engine_config):
    choice, _ = chosen(on_cpu())
    if choice == "upstream":
        return original(attention_config, engine_config)
    from deepspeed.inference.v2.modules.interfaces import DSSelfAttentionRegistry
    from deepspeed.inference.v2.modules.module_registry import ConfigBundle
    from deepspeed.utils import logger

    from ds_fp6.modules import attention

    problem = attention.problem(attention_config)
    if problem:
        logger.warning(f"ds_fp6: DeepSpeed's attention instead of Triton's: {problem}")
        return original(attention_config, engine_config)
    bundle = ConfigBundle(name=attention.TritonAttention.name(), config=attention_config)
    return DSSelfAttentionRegistry.instantiate_config(bundle)


def _wrap_heuristics() -> None:
    from deepspeed.inference.v2.modules import heuristics

    wrap(heuristics, "instantiate_attention", _instantiate_attention)


HOOKS = (
    Hook("heuristics.instantiate_attention", "GPU: attention split over the KV length", _wrap_heuristics),
)
