"""What the step benchmark computes from its times; the steps themselves need a GPU."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from ds_fp6.bench import step
from ds_fp6.bench.__main__ import main
from ds_fp6.bench.kernel_times import Kernel, by_name, gaps, kernel_class, seconds_by_class, taken
from ds_fp6.bench.linear_cuda import Ceilings
from ds_fp6.integrations.engine import build_engine, fill_cache, generate, greedy_steps
from ds_fp6.integrations.engine import step as engine_step
from models import build, save


@pytest.mark.parametrize(
    "name, kind",
    [
        ("void ds_fp6::cuda::sm90::linear_sm90_kernel<...>(CUtensorMap, ds_fp6::cuda::sm90::Problem)", "linear"),
        ("void ds_fp6::cuda::sm80::linear_sm80_kernel<...>(ds_fp6::cuda::sm80::Problem)", "linear"),
        ("nvjet_sm90_hsh_128x8_64x12_4x1_v_bz_TNT", "linear"),
        ("void gemv2T_kernel_val<int, int, __half>", "linear"),
        ("flash_fwd_splitkv_kernel", "attention"),
        ("_decode_kernel", "attention"),
        ("void kv_rotary_pos_kernel<__half, 128>", "attention"),
        ("ncclDevKernel_AllReduce_Sum_f16_RING_LL", "communication"),
        ("void at::native::elementwise_kernel<128, 4>", "other"),
    ],
)
def test_kernels_by_name(name, kind):
    assert kernel_class(name) == kind


def test_what_kernels_take_adds_up_to_when_any_ran():
    kernels = [Kernel("nvjet", 0.0, 1.0), Kernel("nccl", 0.5, 2.0), Kernel("nvjet", 3.0, 3.5), Kernel("copy", 3.1, 3.2)]
    for order in (kernels, kernels[::-1]):
        seconds = seconds_by_class(order)
        # Each instant is that kernel's which ends next: from 0.5 to 1 the first one's, from 3.1 to 3.2 the copy's.
        assert seconds == pytest.approx({"communication": 1.0, "attention": 0, "linear": 1.4, "other": 0.1})
        assert [(name, runs) for name, runs, _ in by_name(order)] == [("nvjet", 2), ("nccl", 1), ("copy", 1)]
    # One that is there all along takes what the others leave.
    kernels.append(Kernel("all along", -1.0, 4.0))
    assert sum(seconds for _, seconds in taken(kernels)) == pytest.approx(5.0)
    assert taken(kernels)[-1] == (kernels[-1], pytest.approx(5.0 - 2.5))
    assert taken([]) == [] and by_name([]) == []


def test_gaps_are_when_nothing_ran():
    kernels = [Kernel("norm", 0.0, 1.0), Kernel("nvjet", 0.5, 2.0), Kernel("norm", 1.0, 1.5), Kernel("copy", 3.0, 3.5)]
    kernels += [Kernel("nvjet", 4.0, 5.0), Kernel("copy", 6.5, 7.0), Kernel("copy", 7.0, 7.5)]
    for order in (kernels, kernels[::-1]):
        found = gaps(order)
        assert found == [("nvjet", "copy", 2, pytest.approx(2.5)), ("copy", "nvjet", 1, pytest.approx(0.5))]
    busy = sum(seconds for _, seconds in taken(kernels))
    assert busy + sum(seconds for *_, seconds in found) == pytest.approx(7.5)
    assert gaps([]) == [] == gaps(kernels[:1])


def test_floor_of_llama_70b():
    shape = step.Shape("llama-2-70b", batch=32, context=399)
    weights = 80 * (10240 * 8192 + 8192 * 8192 + 57344 * 8192 + 8192 * 28672)
    cache = 32 * 400 * 2 * 8 * 128 * 2 * 80
    head = 2 * 32000 * (8192 + 32)
    ceilings = Ceilings(bandwidth=4e12, operations=8e14)
    assert shape.linear_weights() == weights and shape.kv_bytes() == cache and shape.head_bytes() == head
    assert shape.floor(ceilings, 6) == pytest.approx((weights * 0.75 + cache + head) / 4e12)
    # 1000 tokens more are bound by the tensor cores.
    mixed = step.Shape("llama-2-70b", batch=32, context=399, prompt=1000)
    memory = (mixed.kv_bytes() + mixed.head_bytes()) / 4e12
    assert mixed.floor(ceilings, 6) == pytest.approx(2 * 1032 * weights / 8e14 + memory)
    halves = step.Shape("llama-2-70b", batch=32, context=399, tp=2)
    assert halves.linear_weights() == weights // 2 and halves.kv_bytes() == cache // 2


def test_idle_is_the_share_without_a_kernel():
    classes = dict.fromkeys(("linear", "attention", "communication", "other"), 0.002)
    kernels, nothing = [("linear_sm90", 128.0, 0.00256), ("copy", 0.5, 1e-6)], [("copy", "norm", 2.0, 5e-6)]
    result = step.Result("wf6af16", 0.010, 0.005, classes, kernels, nothing)
    assert result.busy == pytest.approx(0.008) and result.idle == pytest.approx(0.2)
    (text,) = step.kernel_lines(result, 1)
    assert text.split() == ["128.0", "x", "20.00", "us", "=", "2.560", "ms", "linear_sm90"]
    (text,) = step.gap_lines(result, 3)
    assert text.split() == ["2.0", "x", "2.50", "us", "=", "0.005", "ms", *"nothing between copy and norm".split()]
    assert step.line(result).split() == ["wf6af16", "10.000", "5.000", "2.00", *["2.000"] * 4, "20.0%"]


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is not None, reason="matplotlib is installed")
def test_plot_names_what_it_lacks(tmp_path):
    with pytest.raises(RuntimeError, match="matplotlib"):
        step.plot([], "a step", tmp_path / "step.png")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_says_that_there_is_no_gpu(capsys):
    assert main(["step", "--model", "llama-2-7b"]) == 2
    assert "no NVIDIA GPU" in capsys.readouterr().err


def test_a_filled_cache_continues_as_a_computed_one(tmp_path):
    directory = save(build("llama_gqa", torch.float16), tmp_path)
    engine = build_engine(directory, max_context=256, memory_config={"mode": "allocate", "size": 32})
    generate(engine, [torch.arange(5)], 2)
    fill_cache(engine, {7: 130, 8: 1})
    assert engine._state_manager.get_sequence(7).seen_tokens == 130
    logits = engine_step(engine, {7: torch.tensor([3]), 8: torch.tensor([4])})
    assert logits.shape[0] == 2 and torch.isfinite(logits).all()
    assert engine._state_manager.get_sequence(7).seen_tokens == 131
    engine.flush(7), engine.flush(8)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("with_prompt", [False, True])
def test_greedy_steps_are_those_of_generation(tmp_path, ahead, with_prompt):
    directory = save(build("llama_gqa", torch.float16), tmp_path)
    engine = build_engine(directory, max_context=256, memory_config={"mode": "allocate", "size": 32})
    prompts = [torch.arange(5), torch.arange(3, 20)]
    expected, _ = generate(engine, prompts, 6)
    first = engine_step(engine, dict(enumerate(prompts))).argmax(dim=-1)
    prompt = torch.arange(7) if with_prompt else None
    steps = greedy_steps(engine, {0: first[:1], 1: first[1:]}, prompt, ahead)
    chosen = torch.stack([next(steps) for _ in range(5)], dim=1)
    assert torch.equal(chosen[:2], expected[:, 1:])
    if with_prompt:
        assert chosen.shape[0] == 3 and (chosen[2] == chosen[2, 0]).all()
