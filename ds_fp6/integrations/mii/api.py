"""``mii.pipeline`` and ``mii.serve``: what can be refused before anything is loaded or launched."""

from __future__ import annotations

from ds_fp6.integrations.checkpoint import check_location
from ds_fp6.integrations.deepspeed.quantization import checked_mode, stand_alone
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


def _init_distributed(original, model_config):
    stand_alone(model_config.tensor_parallel)
    return original(model_config)


def _wrap_init_distributed() -> None:
    from mii import utils

    wrap(utils, "init_distributed", _init_distributed)


HOOKS = (
    Hook("mii.api._parse_kwargs_to_model_config", "unknown quantization modes are refused first", _wrap_parsing),
    Hook("mii.utils.init_distributed", "a process of its own takes a free port", _wrap_init_distributed),
)
