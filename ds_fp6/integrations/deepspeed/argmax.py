"""The likeliest token of each row: by Triton's kernel of this package where pointwise ones are ours, else by torch.

Torch gives a row to one block of threads, whatever its length.
"""

from __future__ import annotations

import torch

from ds_fp6.integrations.deepspeed import pointwise


def argmax(logits: torch.Tensor) -> torch.Tensor:
    """``logits.argmax(dim=-1)`` of [rows, vocabulary], the lowest index of the largest value; does not wait for the
    device. Raises ``ValueError`` for a setting of ``pointwise`` that cannot be had.
    """
    if pointwise.chosen(logits.device.type == "cpu")[0] == "triton":
        from ds_fp6.triton_ops import argmax as kernel

        if logits.dtype in kernel.DTYPES and logits.dim() == 2 and logits.stride(1) == 1 and logits.numel():
            return kernel.argmax(logits)
    return logits.argmax(dim=-1)
