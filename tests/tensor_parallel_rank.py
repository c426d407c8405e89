"""One rank of a launcher, for test_fastgen_tensor_parallel.py: saves what it generated and the weights that it holds.

    deepspeed --num_gpus N tests/tensor_parallel_rank.py MODEL MODE DIRECTORY
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import models
import torch

NEW_TOKENS = 12
PROMPT_LENGTHS = (5, 33)
#: In, hidden and out channels of two layers, the second split over its inputs. No power of two divides any of them.
IN, HIDDEN, OUT = 75, 105, 63


def generate(path: str, mode: str, ranks: int) -> tuple[list[str], dict[str, torch.Tensor]]:
    """Greedy tokens as text, and each quantized weight of this rank as unpacked codes and scales."""
    import mii

    pipe = mii.pipeline(
        path, quantization_mode=mode, tensor_parallel=ranks, tokenizer=models.number_tokenizer(),
        inference_engine_config={"state_manager": {"memory_config": {"mode": "allocate", "size": 8}}},
    )  # fmt: skip
    prompts = [" ".join(map(str, prompt.tolist())) for prompt in models.random_prompts(*PROMPT_LENGTHS)]
    responses = pipe(prompts, max_new_tokens=NEW_TOKENS, do_sample=False, ignore_eos=True)
    weights = {}
    for i, layer in enumerate(pipe.inference_engine.model()._transformer):
        for name in layer.annotation_attrs:
            parameter = getattr(layer, name)
            if hasattr(parameter, "scales"):
                weights |= unpacked(f"{i}.{name}", parameter)
    pipe.destroy()
    return [response.generated_text for response in responses], weights


def unpacked(name: str, parameter) -> dict[str, torch.Tensor]:
    """The values of a weight's codes (fp32 [out, in]) and its scales (fp32 [out, groups])."""
    from ds_fp6 import PackedWeight

    packed = parameter.as_subclass(torch.Tensor)
    weight = PackedWeight.from_state_dict({"packed": packed, "scales": parameter.scales, "header": parameter.header})
    ones = torch.ones_like(weight.scales)
    codes = PackedWeight(weight.format, weight.group_size, weight.in_features, weight.packed, ones).dequantize()
    return {f"{name}.codes": codes, f"{name}.scales": weight.scales.clone()}


def two_layers(mode: str, rank: int, ranks: int, reduce) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A layer split over its outputs, then one split over its inputs, as DeepSpeed's models shard and load them."""
    from deepspeed.inference.v2.inference_utils import DtypeEnum
    from deepspeed.inference.v2.model_implementations.inference_transformer_base import DSTransformerModelBase
    from deepspeed.inference.v2.model_implementations.sharding.utils import get_shard_endpoints
    from deepspeed.inference.v2.modules.configs import DSLinearConfig

    from ds_fp6 import Mode
    from ds_fp6.modules.linear import QuantizedLinear

    generator = torch.Generator().manual_seed(1)
    first, second = torch.randn(HIDDEN, IN, generator=generator), torch.randn(OUT, HIDDEN, generator=generator)
    x = torch.randn(4, IN, generator=generator)
    begin, end = get_shard_endpoints(HIDDEN, rank, ranks)

    def layer(inputs: int, outputs: int) -> QuantizedLinear:
        config = DSLinearConfig(
            max_tokens=8, in_channels=inputs, out_channels=outputs,
            input_dtype=DtypeEnum.fp32, output_dtype=DtypeEnum.fp32,
        )  # fmt: skip
        return QuantizedLinear(config, {"mode": Mode.parse(mode)})

    model = SimpleNamespace(
        tp_rank=rank, tp_size=ranks, mlp_1=layer(IN, end - begin), mlp_2=layer(end - begin, OUT),
        config=SimpleNamespace(), gated_mlp=False,
    )  # fmt: skip
    w1 = model.mlp_1.transform_param(first[begin:end])
    w2 = DSTransformerModelBase.transform_mlp_2_param(model, second)
    y = model.mlp_2(model.mlp_1(x, w1), w2)
    reduce(y)
    return y, unpacked("mlp_1", w1) | unpacked("mlp_2", w2)


if __name__ == "__main__":
    path, mode, directory = sys.argv[-3:]
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    texts, weights = generate(path, mode, ranks)
    import deepspeed.comm as dist

    y, layers = two_layers(mode, rank, ranks, dist.all_reduce)
    torch.save({"texts": texts, "weights": weights, "y": y, "layers": layers}, Path(directory) / f"{rank}.pt")
