"""DeepSpeed's CPU accelerator, completed for inference: a legal device, and the operators that it lacks."""

from __future__ import annotations

from typing import Any

from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

from ds_fp6.cpu import memory
from ds_fp6.cpu.builders import BUILDERS


class CPUAccelerator(CPU_Accelerator):
    """``CPU_Accelerator`` on which the FastGen engine runs."""

    def current_device(self) -> str:
        """``"cpu"``. DeepSpeed's own answer is the local rank, which torch takes for a GPU's index."""
        return "cpu"

    def available_memory(self, device_index: int | None = None) -> int:
        return memory.available_bytes()

    def get_op_builder(self, class_name: str) -> Any:
        return BUILDERS.get(class_name) or super().get_op_builder(class_name)

    def create_op_builder(self, op_name: str) -> Any:
        # Shared-memory collectives only speed gloo up, and DeepSpeed compiles them for half a minute when it
        # first initializes torch.distributed. None is its own way of saying that they are not there.
        return None if op_name == "ShareMemCommBuilder" else super().create_op_builder(op_name)
