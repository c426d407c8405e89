"""The linear layer of a quantized model, registered with DeepSpeed's module registry."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.inference.v2.inference_parameter import InferenceParameter
from deepspeed.inference.v2.inference_utils import ActivationType, is_gated
from deepspeed.inference.v2.kernels.core_ops import CUDABiasActivation, CUDAGatedActivation
from deepspeed.inference.v2.modules.configs import DSLinearConfig
from deepspeed.inference.v2.modules.interfaces import DSLinearBase, DSLinearRegistry

from ds_fp6 import ops
from ds_fp6.formats import Mode
from ds_fp6.weight import PackedWeight


@DSLinearRegistry.register_module
class QuantizedLinear(DSLinearBase):
    """``activation(x · Wᵀ + b)`` with W kept as packed codes; the activation may be gated.

    Parameters are quantized and packed by ``transform_param`` while the checkpoint loads, one at a time, on the
    device that will use them. What is kept of a weight is an ``InferenceParameter`` of the packed uint8 codes
    with the auxiliary tensors ``scales``, and ``header`` by which a serialized model can be moved to another device.
    """

    @staticmethod
    def name() -> str:
        return "ds_fp6_quantized_linear"

    @staticmethod
    def supports_config(config: DSLinearConfig) -> bool:
        return config.input_dtype == config.output_dtype

    def __init__(self, config: DSLinearConfig, implementation_config: dict[str, Any]) -> None:
        super().__init__(config, implementation_config)
        self.mode: Mode = implementation_config["mode"]
        activation = ActivationType(config.activation)
        self._gated = is_gated(activation)
        self._out_channels = config.out_channels * (2 if self._gated else 1)
        self._dtype: torch.dtype = config.output_dtype
        self._device = torch.device(get_accelerator().current_device())
        #: Whether a gate may be part of the matrix product, where the kernel has it; and whether it has, by rows.
        self._may_fuse = self._gated and self._device.type == "cuda" and implementation_config.get("fuses_gates", True)
        self._has_gates: dict[int, bool] = {}
        #: fp32 [out, 1], set while a shard of a row-parallel weight is transformed: the scales of its full rows.
        self.row_scales: torch.Tensor | None = None
        if self._gated:
            self._activation = CUDAGatedActivation(config.out_channels, self._dtype, activation)
        elif activation != ActivationType.IDENTITY:
            self._activation = CUDABiasActivation(config.out_channels, self._dtype, activation)
        else:
            self._activation = None

    def transform_param(self, param: torch.Tensor) -> InferenceParameter:
        """A weight [out, in] to codes, packed for x of the activations' dtype, and scales; a bias [out] to that dtype.

        Raises ``ValueError`` for another shape, or naming row and column of a weight that is not finite.
        """
        if param.dim() == 1:
            return InferenceParameter.initialize(param.to(self._dtype))
        expected = (self._out_channels, self._config.in_channels)
        if tuple(param.shape) != expected:
            raise ValueError(f"a weight of this layer is {list(expected)}, got {list(param.shape)}")
        scales = None if self.row_scales is None else self.row_scales.to(self._device)
        weight = PackedWeight.from_dense(param.to(self._device), self.mode, scales, self._dtype)
        return InferenceParameter.initialize(weight.packed, scales=weight.scales, header=weight.header)

    def forward(self, hidden_states: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None = None) -> torch.Tensor:
        """[..., in] → [..., out]; ``w`` and ``b`` are what ``transform_param`` returned."""
        fmt = self.mode.format
        bias = None if b is None else b.as_subclass(torch.Tensor)
        arguments = (
            hidden_states, w.as_subclass(torch.Tensor), w.scales, bias,
            fmt.exponent_bits, fmt.mantissa_bits, self.mode.group_size,
        )  # fmt: skip
        if self._may_fuse and self._fuses_gate(hidden_states.shape[:-1].numel()):
            return ops.gated_linear(*arguments, self._activation.act_fn.value)
        y = ops.linear(*arguments)
        if self._gated:
            out = y.new_empty((*y.shape[:-1], self._config.out_channels))
            self._activation(out, y)
            return out
        if self._activation is not None:
            self._activation(y)
        return y

    def _fuses_gate(self, rows: int) -> bool:
        """Whether the CUDA kernel for so many rows applies gates itself."""
        if rows not in self._has_gates:
            fmt = self.mode.format
            name = ops.cuda_kernel_name(
                rows, self._out_channels, self._config.in_channels,
                fmt.exponent_bits, fmt.mantissa_bits, self.mode.group_size, self._device,
            )  # fmt: skip
            self._has_gates[rows] = name == "sm90"
        return self._has_gates[rows]

    @property
    def output(self) -> torch.Tensor:
        """An output of ``max_tokens`` rows. The layer itself allocates exactly what a batch needs."""
        return torch.empty((self._config.max_tokens, self._config.out_channels), dtype=self._dtype, device=self._device)
