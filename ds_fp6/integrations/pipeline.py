"""A text-generation pipeline of MII for the command line and the examples."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Generated:
    """What a pipeline wrote after each prompt, and the seconds that all of them took together."""

    responses: list[Any]
    seconds: float

    @property
    def tokens(self) -> int:
        return sum(response.generated_length for response in self.responses)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def open_pipeline(model: str | Path, quantization_mode: str | None = None, **options: Any) -> Any:
    """``mii.pipeline(model, quantization_mode=quantization_mode, **options)``, hooked whatever DS_FP6_AUTOLOAD says.

    Raises ``UnsupportedVersion`` for versions of DeepSpeed or MII that the hooks do not know, ``ValueError`` for an
    unknown mode or model.
    """
    import mii
    from deepspeed.inference.v2.logging import inference_logger

    from ds_fp6.integrations import mii as hooks

    hooks.install()
    inference_logger(logging.WARNING).setLevel(logging.WARNING)
    return mii.pipeline(str(model), quantization_mode=quantization_mode, **options)


def generate(pipeline: Any, prompts: Sequence[str], **options: Any) -> Generated:
    """Continues all ``prompts`` together. ``options`` are MII's, e.g. ``max_new_tokens`` or ``do_sample``."""
    start = time.perf_counter()
    responses = pipeline(list(prompts), **options)
    return Generated(responses, time.perf_counter() - start)


def linear_weight_bytes(pipeline: Any) -> int:
    """Bytes that the weight matrices of the transformer layers take on this rank, scales included."""
    total = 0
    for layer in pipeline.inference_engine.model()._transformer:
        for name in layer.annotation_attrs:
            weight = getattr(layer, name)
            if weight is not None and weight.dim() >= 2:
                total += weight.nbytes + getattr(getattr(weight, "scales", None), "nbytes", 0)
    return total
