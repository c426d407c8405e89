"""Whether a linear layer's kernel asks the memory for the next layer's weight, and which one that is.

Between two linear layers of a decode step small kernels run, and the memory idles. ``linear_sm90`` can have it fetch the
beginning of the next weight into the L2 cache meanwhile.
"""

from __future__ import annotations

import os

from ds_fp6.integrations.patching import Hook, wrap

#: ``1`` or ``0``; unset is 0.
VARIABLE = "DS_FP6_WEIGHTS_AHEAD"

#: A transformer layer's weights, by DeepSpeed's attribute names, as a forward pass reads them.
ORDER = ("qkv_w", "attn_out_w", "mlp_1_w", "mlp_2_w")


def chosen(cpu: bool) -> tuple[bool, str]:
    """Whether weights are asked for ahead, and why. ``cpu``: whether the engine runs on a CPU, which has no such kernel.

    Raises ``ValueError`` for another value of the variable than 0 or 1.
    """
    text = os.environ.get(VARIABLE, "").strip()
    if text not in ("", "0", "1"):
        raise ValueError(f"{VARIABLE} must be 0 or 1, got {text!r}")
    if cpu:
        return False, "the engine runs on a CPU"
    return text == "1", f"{VARIABLE}={text}" if text else "default"


def _set_parameters(original, self, transformer, non_transformer, **kwargs) -> None:
    """Tells quantized weights which one follows. What else a layer reads between them makes no difference."""
    from ds_fp6.modules.linear import follow

    layers = list(transformer)
    original(self, layers, non_transformer, **kwargs)
    weights = [getattr(layer, name, None) for layer in layers for name in ORDER]
    follow([weight for weight in weights if getattr(weight, "scales", None) is not None])


def _wrap_model() -> None:
    from deepspeed.inference.v2.model_implementations.inference_model_base import DSInferenceModelBase

    wrap(DSInferenceModelBase, "set_parameters", _set_parameters)


HOOKS = (
    Hook("DSInferenceModelBase.set_parameters", "GPU: the next weight is asked for ahead", _wrap_model),
)
