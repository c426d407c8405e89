"""Dummy weights: a checkpoint that exists only as a config.json.

Parameters are drawn at random on the accelerator, one at a time, as the loader asks for them, so a model of any
size can be measured without its checkpoint and without ever holding its 16-bit weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.inference.v2.checkpoint import HuggingFaceCheckpointEngine

#: Checkpoints name each expert's matrices apart, where transformers holds those of all experts in one tensor:
#: by model type, the prefix in transformers, then in a checkpoint, then the names of gate, up and down.
EXPERT_NAMES = {
    "mixtral": (".mlp.", ".block_sparse_moe.", ("w1", "w3", "w2")),
    "qwen2_moe": (".mlp.", ".mlp.", ("gate_proj", "up_proj", "down_proj")),
}


class DummyCheckpointEngine(HuggingFaceCheckpointEngine):
    """Yields random parameters of the shapes that ``config.json`` implies.

    Matrices and biases are normal with standard deviation ``initializer_range`` (0.02 where the config has
    none), norms are 1. The same seed gives the same values on one kind of device, in any order of loading.
    """

    def __init__(self, model_name_or_path: str, seed: int = 0, **kwargs) -> None:
        self._seed = seed
        super().__init__(model_name_or_path, **kwargs)

    def _fetch_checkpoint_files(self) -> list[str]:
        return []

    def parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        config = self.model_config
        dtype = getattr(config, "dtype", None) or torch.float16
        std = getattr(config, "initializer_range", None) or 0.02
        device = torch.device(get_accelerator().current_device())
        generator = torch.Generator(device).manual_seed(self._seed)
        for name, shape in checkpoint_shapes(config):
            if re.search(r"norm[^.]*\.weight$|ln_f\.weight$", name):
                yield name, torch.ones(shape, dtype=dtype, device=device)
            else:
                parameter = torch.empty(shape, dtype=dtype, device=device)
                yield name, parameter.normal_(std=std, generator=generator)


def checkpoint_shapes(config) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of each tensor in a checkpoint of ``config``, in the order of the model's modules.

    ``config`` is transformers' configuration, or the contents of a config.json.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    if isinstance(config, dict):
        config = AutoConfig.for_model(**config)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    inner, outer, (gate, up, down) = EXPERT_NAMES.get(config.model_type, ("", "", ("", "", "")))
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        if inner and re.search(r"\.mlp\.(gate|experts)\.", name):
            name = name.replace(inner, outer)
        if name.endswith("experts.gate_up_proj"):
            experts, width, hidden = shape
            for expert in range(experts):
                for part in (gate, up):
                    yield f"{name.removesuffix('gate_up_proj')}{expert}.{part}.weight", (width // 2, hidden)
        elif name.endswith("experts.down_proj"):
            for expert in range(shape[0]):
                yield f"{name.removesuffix('down_proj')}{expert}.{down}.weight", shape[1:]
        else:
            yield name, shape
