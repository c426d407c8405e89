"""MII's processing of logits and tokens in batches whose requests differ in their parameters."""

from __future__ import annotations

import torch

from ds_fp6.integrations.deepspeed.argmax import argmax
from ds_fp6.integrations.deepspeed.batch import to_device
from ds_fp6.integrations.patching import Hook, replace


def _rows(requests, name: str) -> list[int]:
    return [row for row, request in enumerate(requests) if name in request.post_processing]


def run_batch_processing(input_tensor: torch.Tensor, requests, processor_fns: dict) -> torch.Tensor:
    """Each row through the one of ``processor_fns`` that its request names; rows of others as they are.

    MII's own raised ``TypeError`` where some requests name one and others none, and waited for the device to take each
    list of rows.
    """
    order: list[int] = []
    device = input_tensor.device
    outputs: list[torch.Tensor] = []
    for name, process in processor_fns.items():
        rows = _rows(requests, name)
        if len(rows) == len(requests):
            return process(input_tensor)
        if rows:
            order += rows
            outputs.append(process(input_tensor[to_device(rows, device)]))
    if not outputs:
        return input_tensor
    rest = sorted(set(range(len(requests))) - set(order))
    if rest:
        outputs.append(input_tensor[to_device(rest, device)])
    order += rest
    return torch.cat(outputs)[to_device(sorted(range(len(order)), key=order.__getitem__), device)]


def run_batch_stop_criterion(next_tokens: torch.Tensor, requests, processor_map: dict) -> torch.Tensor:
    """Whether any of a request's stop criteria holds, bool [requests].

    MII's own raised where requests have different numbers of them.
    """
    done = torch.zeros(len(requests), dtype=torch.bool, device=next_tokens.device)
    for name, criterion in processor_map.items():
        rows = _rows(requests, name) if "Stop" in name else []
        if rows:
            done[rows] |= criterion(next_tokens[rows])
    return done


def sample(_self, logits: torch.Tensor) -> torch.Tensor:
    """A token of each row's distribution, int64 [n]: what torch's ``Categorical`` draws from the same generator.

    That one checks on the host whether its probabilities are any, which waits for the device.
    """
    probabilities = logits.float().softmax(dim=-1)
    return argmax(probabilities / torch.empty_like(probabilities).exponential_())


def likeliest(_self, logits: torch.Tensor) -> torch.Tensor:
    """The likeliest token of each row, int64 [n]. MII's own first makes a copy of the logits in fp32."""
    return argmax(logits)


def _replace_processing() -> None:
    from mii.batching import postprocess
    from mii.batching.generation.samplers import GreedySampler, LogitsSampler

    replace(postprocess, "run_batch_processing", run_batch_processing)
    replace(postprocess, "run_batch_stop_criterion", run_batch_stop_criterion)
    LogitsSampler.__call__ = sample
    GreedySampler.__call__ = likeliest


HOOKS = (Hook("mii.batching.postprocess", "requests with different parameters in one batch", _replace_processing),)
