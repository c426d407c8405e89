"""Mixture of experts: gating, the scatter of tokens to experts, their matrix products, and the gather back."""

from __future__ import annotations

import torch

from ds_fp6.cpu.core_ops import activate


def top_k_gating(
    counts: torch.Tensor, scores: torch.Tensor, assignments: torch.Tensor, offsets: torch.Tensor,
    logits: torch.Tensor, batch: torch.Tensor,
) -> None:
    """The k experts of each token, by softmax over all logits; ties go to the lower expert.

    Args:
        counts: int32 [experts], zeroed by the caller; receives the tokens of each expert.
        scores: fp32 [n, k], the softmax probability of each choice.
        assignments: int32 [n, k], the chosen experts, -1 for padding tokens.
        offsets: int32 [n, k], the place of the token among its expert's.
        logits: [n, experts]; batch: int32 [2], tokens that are not padding first.
    """
    n, k = scores.shape
    probabilities = torch.softmax(logits.float(), dim=-1)
    values, experts = torch.sort(probabilities, dim=-1, descending=True, stable=True)
    values, experts = values[:, :k], experts[:, :k].clone()
    experts[int(batch[0]) :] = -1
    scores.copy_(values)
    assignments.copy_(experts)
    flat = experts.reshape(-1)
    chosen = torch.nn.functional.one_hot(flat.clamp(min=0), counts.shape[0]) * (flat >= 0).unsqueeze(1)
    places = (chosen.cumsum(0) - chosen).gather(1, flat.clamp(min=0).unsqueeze(1))
    offsets.copy_(places.view(n, k))
    counts += chosen.sum(0)


def moe_scatter(
    moe_input: torch.Tensor, cumsum: torch.Tensor, slots: torch.Tensor, activations: torch.Tensor,
    counts: torch.Tensor, assignments: torch.Tensor, offsets: torch.Tensor,
) -> None:
    """Copies each token to its experts' rows, experts one after another.

    Args:
        moe_input: [n · k, dim]; cumsum: int64 [experts], the inclusive sum of ``counts``.
        slots: int32 [n, k], the row of each choice, -1 for padding; activations: [n, dim].
    """
    torch.cumsum(counts, 0, dtype=torch.int64, out=cumsum)
    starts = cumsum - counts
    chosen = assignments >= 0
    rows = torch.where(chosen, starts[assignments.clamp(min=0).long()] + offsets, -1)
    slots.copy_(rows)
    token = torch.arange(len(activations)).unsqueeze(1).expand_as(rows)
    moe_input[rows[chosen]] = activations[token[chosen]]


def moe_gather(
    out: torch.Tensor, moe_output: torch.Tensor, scores: torch.Tensor, slots: torch.Tensor, counts: torch.Tensor,
    normalize: bool,
) -> None:
    """``out[t] = Σ_j score[t, j] · moe_output[slots[t, j]]``, padding tokens left alone; zeroes ``counts``.

    ``normalize`` divides the scores of a token by their sum.
    """
    weights = scores / scores.sum(-1, keepdim=True) if normalize else scores
    chosen = slots[:, 0] >= 0
    picked = moe_output[slots[chosen].long()].float()
    out[chosen] = (picked * weights[chosen].unsqueeze(-1)).sum(1).to(out.dtype)
    counts.zero_()


def moe_gemm(
    out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, cumsum: torch.Tensor,
    activation: int,
) -> None:
    """``out = act(x · weight[e] (+ bias[e]))`` for the rows of each expert e.

    x [rows, in], weight [experts, in, out], bias [experts, out], cumsum int64 [experts], the rows' inclusive ends.
    """
    weight = weight.as_subclass(torch.Tensor)
    bias = None if bias is None else bias.as_subclass(torch.Tensor)
    start = 0
    for expert, end in enumerate(cumsum.tolist()):
        if end > start:
            rows = x[start:end]
            # fp16 products go through fp32, which CPUs are faster at and which is exact for them.
            half = weight.dtype == torch.float16
            y = rows.float() @ weight[expert].float() if half else rows @ weight[expert]
            y = y if bias is None else y + bias[expert]
            out[start:end] = activate(y, int(activation))
        start = end


def mixed_gemm(*args: object) -> None:
    """The engine looks this operator up and never calls it."""
    raise NotImplementedError("mixed_gemm has no CPU implementation")


def mixed_moe_gemm(*args: object) -> None:
    """The engine looks this operator up and never calls it."""
    raise NotImplementedError("mixed_moe_gemm has no CPU implementation")
