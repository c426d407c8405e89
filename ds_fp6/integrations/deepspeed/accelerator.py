"""On a machine without a GPU, DeepSpeed gets an accelerator that its inference engine can run on."""

from __future__ import annotations

import os

from ds_fp6.integrations.patching import Hook, wrap


def on_cpu() -> bool:
    """Whether DeepSpeed's accelerator is the CPU."""
    from deepspeed.accelerator import get_accelerator

    return get_accelerator().device_name() == "cpu"


def local_rank() -> int:
    """This process's rank on its machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


def _set_accelerator() -> None:
    if not on_cpu():
        return
    from deepspeed.accelerator import set_accelerator

    from ds_fp6.cpu.accelerator import CPUAccelerator

    set_accelerator(CPUAccelerator())


def _rebind_builders() -> None:
    if not on_cpu():
        return
    from deepspeed.ops import op_builder

    from ds_fp6.cpu.builders import BUILDERS

    for name, builder in BUILDERS.items():
        setattr(op_builder, name, builder)


def _all_gather(original, self, output_tensor, input_tensor, group=None, async_op=False):
    if input_tensor.device.type == "cpu" and output_tensor.dim() > input_tensor.dim():
        output_tensor = output_tensor.flatten(0, output_tensor.dim() - input_tensor.dim())
    return original(self, output_tensor, input_tensor, group=group, async_op=async_op)


def _wrap_all_gather() -> None:
    from deepspeed.comm.torch import TorchBackend

    wrap(TorchBackend, "all_gather_into_tensor", _all_gather)


def _init_distributed(original, dist_backend=None, *args, **kwargs):
    if dist_backend == "nccl" and on_cpu():
        dist_backend = "gloo"
    return original(dist_backend, *args, **kwargs)


def _wrap_init_distributed() -> None:
    from deepspeed.comm import comm

    wrap(comm, "init_distributed", _init_distributed)


HOOKS = (
    Hook("deepspeed.accelerator", "CPU: a legal device, the engine's operators", _set_accelerator),
    Hook("deepspeed.ops.op_builder", "CPU: builder names are bound while DeepSpeed is imported", _rebind_builders),
    Hook("deepspeed.comm.torch.TorchBackend.all_gather_into_tensor", "gloo wants a flat output", _wrap_all_gather),
    Hook("deepspeed.comm.init_distributed", "CPU: whoever asks for nccl gets gloo", _wrap_init_distributed),
)
