"""Triton's argmax against torch's, and where it is used."""

from __future__ import annotations

import pytest
import torch
from triton_device import DEVICE

from ds_fp6.integrations.deepspeed import argmax as choice
from ds_fp6.integrations.deepspeed import pointwise
from ds_fp6.triton_ops.argmax import DTYPES, PROGRAMS, TILE, ArgmaxWorkspace, argmax, tiles_each

INFINITY, NAN = float("inf"), float("nan")


def random(*shape: int, dtype: torch.dtype = torch.float16, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


@pytest.fixture(scope="module")
def workspace() -> ArgmaxWorkspace:
    """One for all tests of this file, which each find it as the last one left it."""
    return ArgmaxWorkspace(DEVICE, 8)


def check(logits: torch.Tensor, workspace: ArgmaxWorkspace, splits: int | None = None) -> None:
    found = argmax(logits, workspace, splits)
    assert found.dtype == torch.int64 and found.device == logits.device
    # Torch's on the CPU: what it does with NaN and ties on a GPU is held to the same.
    assert found.tolist() == logits.cpu().argmax(dim=-1).tolist()
    assert not workspace.keys.any() and not workspace.counters.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, vocabulary", [(3, 1), (5, 7), (2, 258), (3, TILE + 1), (3, 32000), (1, 128256)])
def test_random_rows(rows, vocabulary, dtype, workspace):
    for seed in range(2):
        # In 16 bits the largest of so many values often ties with others.
        check(random(rows, vocabulary, dtype=dtype, seed=seed), workspace)


@pytest.mark.parametrize("splits", [1, 2, 3, 64])
def test_any_number_of_programs(splits, workspace):
    check(random(3, 5 * TILE + 11), workspace, splits)


#: Values of a row by their place, over the value that all others have.
ROWS = {
    "all equal": (0.5, {}),
    "ties in one program and others": (0.0, {17: 2.0, 900: 2.0, 5000: 2.0, 7999: 2.0}),
    "the last": (-1.0, {7999: 3.0}),
    "zeros of both signs": (-1.0, {40: -0.0, 41: 0.0, 5000: 0.0}),
    "zeros of both signs, the positive first": (-1.0, {40: 0.0, 41: -0.0, 5000: -0.0}),
    "all negative zeros but one": (-0.0, {6000: 0.0}),
    "negative": (-3.0, {5000: -1.0, 6000: -1.0}),
    "minus infinity": (-INFINITY, {}),
    "one that is finite": (-INFINITY, {7777: -60000.0}),
    "infinities": (1.0, {100: -INFINITY, 2500: INFINITY, 7000: INFINITY}),
    "NaN above infinity": (1.0, {100: INFINITY, 5000: NAN, 6000: INFINITY}),
    "the first NaN": (1.0, {3000: NAN, 3001: NAN, 7000: NAN}),
    "NaN in later tiles of a lane": (NAN, {place: 0.0 for place in range(4500)}),
    "NaN alone": (NAN, {}),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("splits", [1, 2, None])
def test_ties_zeros_infinities_and_nan(splits, dtype, workspace):
    rows = torch.empty(len(ROWS), 8000, dtype=dtype)
    for row, (others, values) in zip(rows, ROWS.values(), strict=True):
        row.fill_(others)
        for place, value in values.items():
            row[place] = value
    # A NaN whose sign is set, and one of other bits, are NaN like any.
    row = rows[list(ROWS).index("the first NaN")]
    bits = row.view(torch.int32 if dtype == torch.float32 else torch.int16)
    bits[3000] = -1
    assert row[3000].isnan() and rows.argmax(dim=-1)[list(ROWS).index("the first NaN")] == 3000
    for some in rows.to(DEVICE).split(len(workspace.keys)):
        check(some, workspace, splits)


def test_strided_rows_and_many(workspace):
    check(random(4, 5000)[:, :4097], workspace)
    check(random(9, 3000)[1::3], workspace)
    # Rows of one program each need no place in the workspace.
    many = random(PROGRAMS // 2 + 1, 20)
    check(many, workspace)
    assert argmax(many[:0]).shape == (0,)
    # Without a workspace it has one of its own, which it leaves as it was.
    for seed in range(2):
        logits = random(2, 3 * TILE, seed=seed)
        assert torch.equal(argmax(logits), logits.argmax(dim=-1))


def test_how_rows_are_spread():
    def programs(rows: int, vocabulary: int) -> int:
        return -(-(-(-vocabulary // TILE)) // tiles_each(rows, vocabulary))

    assert programs(1, 128256) == 63 and programs(1, 1) == 1 and programs(1, TILE + 1) == 2
    for rows in range(1, 600):
        count = programs(rows, 128256)
        assert count == 1 or rows * count <= PROGRAMS and rows <= PROGRAMS // 2


def test_bad_input_is_refused(workspace):
    logits = random(9, 2 * TILE)
    for bad in (logits[0], logits.double(), logits.long()):
        with pytest.raises(ValueError, match="logits must be fp16, bf16 or fp32"):
            argmax(bad)
    with pytest.raises(ValueError, match="must be adjacent, got strides"):
        argmax(logits[:, ::2])
    with pytest.raises(ValueError, match="1 to 1073741824 values, got 0"):
        argmax(logits[:, :0])
    with pytest.raises(ValueError, match="got splits = 0"):
        argmax(logits, splits=0)
    with pytest.raises(ValueError, match="room for 8 rows, got 9"):
        argmax(logits, workspace)


@pytest.mark.skipif(DEVICE != "cuda", reason="needs an NVIDIA GPU: a CUDA graph")
@pytest.mark.parametrize("own", [False, True])
def test_a_captured_launch_runs_again(own):
    logits = random(2, 128256)
    kept = ArgmaxWorkspace(DEVICE) if own else None
    argmax(logits, kept)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = argmax(logits, kept)
    for seed in range(3):
        logits.copy_(random(2, 128256, seed=seed))
        for _ in range(2):
            graph.replay()
            assert torch.equal(found, logits.argmax(dim=-1))


def test_greedy_choices_use_it_where_pointwise_kernels_are_ours(monkeypatch):
    from mii.batching.generation.samplers import GreedySampler

    from ds_fp6.integrations import mii as hooks
    from ds_fp6.integrations.mii.sampling import Sampler, Sampling, choose
    from ds_fp6.triton_ops import argmax as ours

    hooks.install()
    calls = []
    kernel = ours.argmax
    monkeypatch.setattr(ours, "argmax", lambda logits: calls.append(logits.dtype) or kernel(logits))
    logits = random(3, 3000)
    expected = logits.argmax(dim=-1).tolist()
    for chosen in ("upstream", "triton"):
        monkeypatch.setenv(pointwise.VARIABLE, chosen)
        calls.clear()
        assert choice.argmax(logits).tolist() == expected
        assert choose(logits, [Sampler(Sampling(temperature=0))] * 3).tolist() == expected
        assert GreedySampler()(logits).tolist() == expected
        assert calls == [torch.float16] * 3 * (chosen == "triton")
        # What the kernel does not take is torch's.
        assert choice.argmax(logits.double()).tolist() == expected
        assert choice.argmax(logits.t().contiguous().t()).tolist() == expected
