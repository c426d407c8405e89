"""``mii.pipeline`` and ``mii.serve``: what can be refused before anything is loaded or launched."""

from __future__ import annotations

import os

import torch

from ds_fp6.integrations.checkpoint import check_location
from ds_fp6.integrations.deepspeed.accelerator import on_cpu
from ds_fp6.integrations.deepspeed.quantization import checked_mode
from ds_fp6.integrations.deepspeed.world import stand_alone
from ds_fp6.integrations.patching import Hook, wrap


def _parse_model_config(original, *args, **kwargs):
    """Raises ``ValueError`` for an unknown mode, ``FileNotFoundError`` for the path of no directory.

    ``mii.serve`` would find out in another process, and say that its server crashed for some reason.
    """
    model_config, _ = result = original(*args, **kwargs)
    checked_mode(model_config.quantization_mode)
    check_location(model_config.model_name_or_path)
    return result


def _wrap_parsing() -> None:
    from mii import api

    wrap(api, "_parse_kwargs_to_model_config", _parse_model_config)


def _check_ranks(tensor_parallel: int) -> None:
    """Raises ``ValueError`` in every rank of a launcher that started more or fewer than ``tensor_parallel`` ranks, or
    more than there are devices, or on several machines. MII would wait for the missing ones, or fail in some of them.
    """
    if "RANK" not in os.environ:
        if tensor_parallel > 1:
            raise ValueError(
                f"tensor_parallel = {tensor_parallel} needs as many processes, but no launcher started this one: use "
                f"deepspeed --num_gpus {tensor_parallel} or torchrun --nproc-per-node {tensor_parallel}, or mii.serve"
            )
        return
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if ranks != tensor_parallel:
        raise ValueError(f"tensor_parallel is {tensor_parallel}, but the launcher started {ranks} ranks")
    here = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or ranks)
    if here < ranks:
        raise ValueError(f"all {ranks} ranks of a model must be on one machine, but {here} of them are on this one")
    from deepspeed.accelerator import get_accelerator

    devices = get_accelerator().device_count()
    if not on_cpu() and ranks > devices:
        raise ValueError(f"{ranks} ranks need as many devices, this machine has {devices} that they may use")


def _share_cores(ranks: int) -> None:
    """Gives each rank of this machine its share of the cores: with all of them in each, ranks wait for one another."""
    if on_cpu() and ranks > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))


def _init_distributed(original, model_config):
    _check_ranks(model_config.tensor_parallel)
    _share_cores(model_config.tensor_parallel)
    with stand_alone(model_config.tensor_parallel):
        return original(model_config)


def _wrap_init_distributed() -> None:
    from mii import utils

    wrap(utils, "init_distributed", _init_distributed)


HOOKS = (
    Hook("mii.api._parse_kwargs_to_model_config", "unknown quantization modes are refused first", _wrap_parsing),
    Hook("mii.utils.init_distributed", "ranks are counted, a lone one takes a free port", _wrap_init_distributed),
)
