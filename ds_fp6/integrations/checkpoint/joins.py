"""Joining the parts of a parameter: q, k and v; gate and up; experts.

Each part goes from its file straight to its rows of the joined tensor, on the device that will transform it.
DeepSpeed concatenates on the host, and for experts concatenates, stacks and so holds a layer three times.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.inference.v2.model_implementations import common_parameters

from ds_fp6.integrations.checkpoint import staging


def join_rows(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """[n_i, ...] each → [sum n_i, ...], one after the other."""
    joined = _empty_like(parts, (sum(len(part) for part in parts), *parts[0].shape[1:]))
    for rows, part in zip(joined.split([len(part) for part in parts]), parts):
        staging.copy_(rows, part)
    return joined


def interleave_rows(gate: torch.Tensor, up: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """[n, ...] each → [2n, ...] with gate in the even rows and up in the odd ones, as the gated kernels read them."""
    if gate.shape != up.shape:
        raise ValueError(f"gate is {list(gate.shape)}, up is {list(up.shape)}; they must agree")
    joined = _empty_like((gate, up), (2 * len(gate), *gate.shape[1:])) if out is None else out
    staging.copy_(joined[0::2], gate)
    staging.copy_(joined[1::2], up)
    return joined


def stack(experts: Sequence[torch.Tensor]) -> torch.Tensor:
    """[...] of each expert → [experts, ...]."""
    joined = _empty_like(experts, (len(experts), *experts[0].shape))
    for slot, expert in zip(joined, experts):
        staging.copy_(slot, expert)
    return joined


def stack_interleaved(gates: Sequence[torch.Tensor], ups: Sequence[torch.Tensor]) -> torch.Tensor:
    """[n, ...] of each expert's gate and up → [experts, 2n, ...]."""
    joined = _empty_like([*gates, *ups], (len(gates), 2 * len(gates[0]), *gates[0].shape[1:]))
    for slot, gate, up in zip(joined, gates, ups):
        interleave_rows(gate, up, out=slot)
    return joined


def _empty_like(parts: Sequence[torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
    dtype = functools.reduce(torch.promote_types, (part.dtype for part in parts))
    return torch.empty(shape, dtype=dtype, device=get_accelerator().current_device())


def _qkv(self) -> torch.Tensor:
    return self.inference_model.transform_qkv_param(join_rows([self.q_params, self.k_params, self.v_params]))


def _gated(self) -> torch.Tensor:
    return self.inference_model.transform_mlp_1_param(interleave_rows(self.gate_params, self.up_params))


def _fused_gated(self) -> torch.Tensor:
    return self.inference_model.transform_mlp_1_param(interleave_rows(*self.params.chunk(2)))


def _gated_experts(self) -> torch.Tensor:
    joined = stack_interleaved(list(self.gating_experts), list(self.up_experts))
    return self.inference_model.transform_moe_mlp_1_param(joined)


def _mlp_1_experts(self) -> torch.Tensor:
    return self.inference_model.transform_moe_mlp_1_param(stack(list(self.experts)))


def _mlp_2_experts(self) -> torch.Tensor:
    return self.inference_model.transform_moe_mlp_2_param(stack(list(self.experts)))


#: How the parameters that are joined here are finished, by class.
FINALIZERS = {
    common_parameters.UnfusedQKVParameter: _qkv,
    common_parameters.GatedMLPParameter: _gated,
    common_parameters.FusedGatedMLPParameter: _fused_gated,
    common_parameters.UnfusedMoEGatedMLPParameter: _gated_experts,
    common_parameters.UnfusedMoEMLP1Parameter: _mlp_1_experts,
    common_parameters.UnfusedMoEMLP2Parameter: _mlp_2_experts,
}


def install() -> None:
    for parameter, finalize in FINALIZERS.items():
        parameter.finalize = finalize
