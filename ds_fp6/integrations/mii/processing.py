"""MII's processing of logits and tokens in batches whose requests differ in their parameters."""

from __future__ import annotations

import torch

from ds_fp6.integrations.patching import Hook, replace


def _rows(requests, name: str) -> list[int]:
    return [row for row, request in enumerate(requests) if name in request.post_processing]


def run_batch_processing(input_tensor: torch.Tensor, requests, processor_fns: dict) -> torch.Tensor:
    """Each row through the one of ``processor_fns`` that its request names; rows of others as they are.

    MII's own raised ``TypeError`` where some requests name one and others none. Lists of rows go to the device and
    wait for it, so there is none where all requests name the same.
    """
    order: list[int] = []
    outputs: list[torch.Tensor] = []
    for name, process in processor_fns.items():
        rows = _rows(requests, name)
        if len(rows) == len(requests):
            return process(input_tensor)
        if rows:
            order += rows
            outputs.append(process(input_tensor[rows]))
    if not outputs:
        return input_tensor
    rest = sorted(set(range(len(requests))) - set(order))
    if rest:
        outputs.append(input_tensor[rest])
    return torch.cat(outputs)[torch.tensor(order + rest).argsort()]


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


def _replace_processing() -> None:
    from mii.batching import postprocess

    replace(postprocess, "run_batch_processing", run_batch_processing)
    replace(postprocess, "run_batch_stop_criterion", run_batch_stop_criterion)


HOOKS = (Hook("mii.batching.postprocess", "requests with different parameters in one batch", _replace_processing),)
