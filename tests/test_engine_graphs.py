"""Captured decode steps: which there are, how batches are filled, and that nothing changes.

A "graph" here calls the step again: what is captured and with which batch is the same as on a GPU.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

import ds_fp6.integrations.engine as fastgen
from ds_fp6 import triton_ops
from ds_fp6.integrations.deepspeed import graphs
from ds_fp6.integrations.mii.pipeline import kv_capacity
from ds_fp6.triton_ops import plan

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the bookkeeping is tested on the CPU's engine")

MODEL = Path(__file__).parent.parent / "examples" / "tiny-python-llama"
BLOCKS, LIMIT = 20, 12
PROMPTS = [torch.arange(3 + 5 * i, 8 + 11 * i) for i in range(6)]


class Device:
    """Graphs that call what they captured, and cost ``cost`` bytes each."""

    def __init__(self, cost: int = 0, failure: Exception | None = None, willing: bool = True) -> None:
        self.cost, self.failure, self.willing = cost, failure, willing
        self.used = self.captures = self.replays = 0

    def capture(self, run):
        if self.failure is not None:
            raise self.failure
        self.used += self.cost
        self.captures += 1

        def replay():
            self.replays += 1
            return run()

        return replay

    def used_bytes(self) -> int:
        return self.used

    def agree(self, ready: bool) -> bool:
        return ready and self.willing


def build(device: Device | None, budget: int = 1 << 30):
    engine = fastgen.build_engine(
        MODEL, "wf6af16", max_ragged_batch_size=256, max_ragged_sequence_count=LIMIT, max_tracked_sequences=LIMIT,
        max_context=512, memory_config={"mode": "allocate", "size": BLOCKS + (device is not None)},
    )  # fmt: skip
    return engine, None if device is None else graphs.attach(engine, device, budget)


def talk(engine) -> list[torch.Tensor]:
    """Greedy steps of 6, then 5, 3 and 1 sequences, with a prompt that joins in between; the logits of each."""
    tokens = dict(enumerate(PROMPTS))
    found = []
    for step in range(12):
        logits = fastgen.step(engine, tokens)
        assert logits.shape[0] == len(tokens) == engine._batch.current_sequences
        found.append(logits)
        chosen = logits.argmax(-1)
        tokens = {uid: chosen[i : i + 1] for i, uid in enumerate(tokens)}
        if step in (3, 5, 8):
            for uid in sorted(tokens)[{3: 5, 5: 3, 8: 1}[step] :]:
                del tokens[uid]
                engine.flush(uid)
        if step == 6:
            tokens[9] = torch.arange(40, 60)
    return found


def test_steps_are_the_same_with_and_without():
    device = Device()
    engine, captured = build(device)
    plain, _ = build(None)
    for ours, theirs in zip(talk(engine), talk(plain), strict=True):
        # A few units in the last place of fp16: a CPU's linear layer of 6 rows is not its layer of 8.
        torch.testing.assert_close(ours, theirs, rtol=0, atol=6e-2)
        assert torch.equal(ours.argmax(-1), theirs.argmax(-1))
    assert captured.captured == (1, 4, 8) and device.captures == 3
    # Of 12 steps, the first of each size, the prompts' and the joining prompt's are no replays.
    assert device.replays == 12 - 3 - 2
    assert captured.closed is None


def test_filling_touches_its_own_block_only():
    engine, captured = build(Device())
    plain, _ = build(None)
    for one in (engine, plain):
        talk(one)
    scratch = int(captured.scratch_list)
    layers = range(engine.model().num_layers)
    kept = [block for block in range(BLOCKS + 1) if block != scratch]
    held = engine._state_manager.get_sequence(0).all_block_ids()
    theirs = plain._state_manager.get_sequence(0).all_block_ids()
    assert scratch not in held.tolist()
    for layer in layers:
        ours, expected = engine._state_manager.get_cache(layer)[held], plain._state_manager.get_cache(layer)[theirs]
        seen = engine._state_manager.get_sequence(0).seen_tokens
        torch.testing.assert_close(ours.flatten(0, 1)[:seen], expected.flatten(0, 1)[:seen], rtol=0, atol=2e-2)
    assert len(kept) == BLOCKS and kv_capacity(engine) == kv_capacity(plain)
    for one in (engine, plain):
        one.flush(0)
    assert engine.free_blocks == plain.free_blocks == [BLOCKS]


def test_nothing_is_captured_beyond_the_budget():
    device = Device(cost=100)
    engine, captured = build(device, budget=150)
    assert talk(engine)[-1].isfinite().all()
    assert captured.captured == (4, 8) and "DS_FP6_CUDA_GRAPHS_MEMORY" in captured.closed
    # The size of one sequence runs as it comes.
    assert device.captures == 2 and device.replays == 12 - 2 - 2 - 3


@pytest.mark.parametrize("device", [Device(failure=RuntimeError("out of memory")), Device(willing=False)])
def test_a_capture_that_fails_leaves_steps_as_they_were(device):
    engine, captured = build(device)
    plain, _ = build(None)
    for ours, theirs in zip(talk(engine), talk(plain), strict=True):
        assert torch.equal(ours.argmax(-1), theirs.argmax(-1))
    assert captured.captured == () and device.replays == 0
    assert captured.closed and (device.failure is None or "out of memory" in captured.closed)


@pytest.mark.parametrize("limit", [1, 2, 3, 12, 96, 100, 512])
def test_sizes(limit):
    sizes = graphs.sizes(limit)
    assert sizes[-1] == limit and list(sizes) == sorted(set(sizes)) and sizes[0] == 1
    for n in range(9, limit + 1):
        assert next(size for size in sizes if size >= n) <= 2 * n - 1
    # Attention adds up a batch as it adds up the batch that it is filled up to.
    for n, kv_heads in itertools.product(range(1, limit + 1), (1, 8, 32)):
        filled = next(size for size in sizes if size >= n)
        assert plan.splits(n, kv_heads) == plan.splits(filled, kv_heads)


def test_settings(monkeypatch):
    monkeypatch.delenv(graphs.VARIABLE, raising=False)
    monkeypatch.delenv(graphs.attention.VARIABLE, raising=False)
    monkeypatch.setattr(triton_ops, "problem", lambda: None)
    assert graphs.chosen(cpu=False) == (True, "default on a GPU")
    assert graphs.chosen(cpu=True) == (False, "the engine runs on a CPU")
    monkeypatch.setenv(graphs.attention.VARIABLE, "upstream")
    assert graphs.chosen(cpu=False) == (
        False, "DeepSpeed's attention cannot be captured (DS_FP6_ATTENTION=upstream)",
    )  # fmt: skip
    monkeypatch.setenv(graphs.VARIABLE, "1")
    for cpu, why in ((True, "the engine runs on a CPU"), (False, "DeepSpeed's attention cannot be captured")):
        with pytest.raises(ValueError, match=f"DS_FP6_CUDA_GRAPHS=1 cannot be had: {why}"):
            graphs.chosen(cpu)
    monkeypatch.setenv(graphs.VARIABLE, "0")
    assert graphs.chosen(cpu=False) == (False, "DS_FP6_CUDA_GRAPHS=0")
    monkeypatch.setenv(graphs.VARIABLE, "yes")
    with pytest.raises(ValueError, match="must be 0 or 1, got 'yes'"):
        graphs.chosen(cpu=False)
    assert graphs.memory_budget() == 512 << 20
    monkeypatch.setenv(graphs.MEMORY_VARIABLE, "1.5G")
    assert graphs.memory_budget() == 3 << 29
    monkeypatch.setenv(graphs.MEMORY_VARIABLE, "some")
    with pytest.raises(ValueError, match="got 'some'"):
        graphs.memory_budget()


def test_models_that_are_not_captured(tmp_path):
    import models

    engine = fastgen.build_engine(
        models.save(models.build("mixtral"), tmp_path), None, max_ragged_batch_size=64, max_ragged_sequence_count=2,
        max_tracked_sequences=2, memory_config={"mode": "allocate", "size": 2},
    )  # fmt: skip
    assert graphs.model_problem(engine.model()) == "the model has experts"
    plain, _ = build(None)
    assert graphs.model_problem(plain.model()) == "the model runs DeepSpeed's attention"


def test_warming_up_leaves_nothing_behind():
    device = Device()
    engine, captured = build(device)
    free = engine.free_blocks
    graphs.warm_up(engine)
    assert engine.free_blocks == free and not engine._state_manager.tracked_sequences
    assert captured.captured == (1,)
    plain, _ = build(None)
    for ours, theirs in zip(talk(engine), talk(plain), strict=True):
        assert torch.equal(ours.argmax(-1), theirs.argmax(-1))


def test_the_linear_layer_that_can_be_captured():
    x, weight = torch.randn(2, 3, 16), torch.randn(5, 16)
    out = torch.full((6, 8), 7.0)
    graphs.blas_linear(out, x, weight)
    torch.testing.assert_close(out[:, :5], x.flatten(0, 1) @ weight.T)
    assert (out[:, 5:] == 7).all()
