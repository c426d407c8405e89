"""Captured steps: which there are, how batches are filled, and that nothing changes.

A "graph" here calls the step again: what is captured and with which batch is the same as on a GPU.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import ds_fp6.integrations.engine as fastgen
from ds_fp6 import triton_ops
from ds_fp6.integrations.deepspeed import filling, graphs
from ds_fp6.integrations.deepspeed.filling import Filler, Size
from ds_fp6.integrations.mii.pipeline import kv_capacity
from ds_fp6.triton_ops import plan

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the bookkeeping is tested on the CPU's engine")

MODEL = Path(__file__).parent.parent / "examples" / "tiny-python-llama"
BLOCKS, LIMIT = 20, 12
PROMPTS = [torch.arange(3 + 5 * i, 8 + 11 * i) for i in range(6)]


class Device:
    """Graphs that call what they captured, and cost ``cost`` bytes each, half of them at their first replay."""

    def __init__(
        self, cost: int = 0, failure: Exception | None = None, willing: bool = True, free: int = 1 << 40
    ) -> None:  # fmt: skip
        self.cost, self.failure, self.willing, self.free = cost, failure, willing, free
        self.captures = self.replays = 0

    def capture(self, run):
        if self.failure is not None:
            raise self.failure
        self.free -= self.cost // 2
        self.captures += 1
        uploads = iter([self.cost - self.cost // 2])

        def replay():
            self.free -= next(uploads, 0)
            self.replays += 1
            return run()

        return replay

    def free_bytes(self) -> int:
        return self.free

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
    assert captured.captured == ((1, 1), (4, 4), (8, 8)) and device.captures == 3
    # Of 12 steps, the prompts' and the joining prompt's are no replays; the first of each size is, once it is captured.
    assert device.replays == 12 - 2
    assert captured.closed is None


def test_filling_touches_its_own_block_only():
    engine, captured = build(Device())
    plain, _ = build(None)
    for one in (engine, plain):
        talk(one)
    scratch = int(captured.scratch_list[0])
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
    assert captured.captured == ((8, 8),)
    assert captured.closed == "they take 0 MiB of 0 (DS_FP6_CUDA_GRAPHS_MEMORY)"
    # Those of fewer sequences run as they come.
    assert device.captures == 1 and 12 - 2 > device.replays > 0


def test_prompts_get_half_of_the_budget():
    device = Device(cost=100)
    engine, captured = build(device, budget=400)
    for _ in range(3):
        converse(engine, [5, 100, 16, 30])
    assert len([size for size in captured.captured if size.tokens > size.sequences]) == 2
    assert captured.closed is None and captured.closed_to_prompts
    talk(engine)
    assert [size for size in captured.captured if size.tokens == size.sequences] == [(4, 4), (8, 8)]
    assert captured.closed and device.captures == 4


def test_a_capture_leaves_memory_to_other_steps():
    device = Device(cost=100, free=graphs.HEADROOM + 250)
    engine, captured = build(device)
    talk(engine)
    assert device.free >= graphs.HEADROOM and device.captures == 2
    assert captured.closed == "256 MiB of the GPU's memory are left"


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
    sizes = filling.sizes(limit)
    assert sizes[-1] == limit and list(sizes) == sorted(set(sizes)) and sizes[0] == 1
    for n in range(9, limit + 1):
        assert next(size for size in sizes if size >= n) <= 2 * n - 1
    # Attention adds up a batch as it adds up the batch that it is filled up to.
    for n, kv_heads in itertools.product(range(1, limit + 1), (1, 8, 32)):
        filled = next(size for size in sizes if size >= n)
        assert plan.splits(n, kv_heads) == plan.splits(filled, kv_heads)


@pytest.mark.parametrize("limit", [1, 2, 16, 100, 256, 768, 2048])
def test_sizes_of_batches_with_prompts(limit):
    tokens, sequences = filling.token_sizes(limit), filling.prompt_sizes(limit)
    for found in (tokens, sequences):
        assert found[-1] == limit and list(found) == sorted(set(found))
    # Linear layers take tiles of 128 or 96 tokens: filling adds none to what a batch takes.
    tiles = {n: min(-(-n // 128) * 128, -(-n // 96) * 96) for n in range(193, limit - 127)}
    assert all(next(t for t in tokens if t >= n) <= most for n, most in tiles.items())


def test_what_a_batch_is_filled_up_to():
    filler = Filler(sequences=12, tokens=256, scratch=0, longest=40)
    assert filler.size([1] * 5) == (8, 8) and filler.size([1] * 12) == (12, 12)
    assert filler.size([16]) == (1, 16) and filler.size([17]) == (2, 32)  # tokens that fill are a sequence's
    assert filler.size([1, 1, 100]) == (4, 128) and filler.size([30, 1, 1]) == (4, 32)
    assert filler.size([245] + [1] * 11) == (12, 256)
    assert filler.size([100] + [1] * 11) is None  # there is no sequence left to fill with
    assert filler.size([151]) is None and filler.size([152]) == (2, 192)  # a sequence has at most 40 tokens


def converse(engine, lengths: list[int]) -> list[torch.Tensor]:
    """Prompts of so many tokens, one more each step, with all earlier sequences going on; the logits of each step."""
    tokens, found = {}, []
    for uid, length in enumerate(lengths):
        tokens[uid] = torch.arange(7, 7 + length)
        logits = fastgen.step(engine, tokens)
        assert logits.shape[0] == len(tokens) == engine._batch.current_sequences
        assert engine._batch.current_tokens == length + uid
        found.append(logits)
        tokens = {uid: chosen.view(1) for uid, chosen in zip(tokens, logits.argmax(-1), strict=True)}
    for uid in tokens:
        engine.flush(uid)
    return found


def test_steps_with_prompts_are_captured_when_they_come_again():
    device = Device()
    engine, captured = build(device)
    plain, _ = build(None)
    lengths = [5, 100, 16, 30, 62, 13]  # filled with many tokens in more than a cache block, with one, with sequences only
    for turn in range(3):
        for ours, theirs in zip(converse(engine, lengths), converse(plain, lengths), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=6e-2)
            assert torch.equal(ours.argmax(-1), theirs.argmax(-1))
        assert (device.captures, device.replays) == [(0, 0), (6, 6), (6, 12)][turn]
    assert captured.captured == ((2, 16), (4, 32), (4, 128), (8, 32), (8, 48), (8, 96))
    assert engine.free_blocks == plain.free_blocks == [BLOCKS]


def test_what_is_launched_tells_steps_of_one_size_apart():
    launches = iter(["one", "other", "one", "other", "one", "other"])
    runs = []
    steps = graphs.StepGraphs(
        lambda batch: runs.append(batch._current_tokens) or torch.zeros(batch._current_sequences, 3),
        Filler(4, 64, scratch=0, longest=64), device := Device(), budget=2, launches=lambda: next(launches),
    )  # fmt: skip
    batch = SimpleNamespace(_current_sequences=1, _current_tokens=20)
    for _ in range(6):
        batch._inflight_seq_descriptors_shadow_buf = [0, 20, 0, 0]
        batch._token_to_seq_storage_shadow_buf, batch._kv_blocks_ptr_buf, batch._batch_tokens = [0] * 20, [0], []
        steps.pad(batch)
        assert steps.forward(batch).shape == (1, 3) and batch._current_tokens == 20
    # Each of the two steps ran, ran and was captured and replayed, and was replayed.
    assert runs == [32] * (2 * 4) and device.captures == 2 and device.replays == 4


def test_prompts_may_be_left_out(monkeypatch):
    monkeypatch.setattr(graphs, "takes_prompts", lambda: False)
    device = Device()
    engine, captured = build(device)
    for _ in range(3):
        converse(engine, [5, 100])
    assert device.captures == 0 and captured.captured == ()


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
    with pytest.raises(ValueError, match="must be 0, 1 or decode, got 'yes'"):
        graphs.chosen(cpu=False)
    monkeypatch.setenv(graphs.VARIABLE, "decode")
    monkeypatch.delenv(graphs.attention.VARIABLE)
    assert graphs.chosen(cpu=False) == (True, "DS_FP6_CUDA_GRAPHS=decode") and not graphs.takes_prompts()
    monkeypatch.delenv(graphs.VARIABLE)
    assert graphs.takes_prompts()
    assert graphs.memory_budget() == 1 << 30
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
    assert captured.captured == ((1, 1),)
    plain, _ = build(None)
    for ours, theirs in zip(talk(engine), talk(plain), strict=True):
        assert torch.equal(ours.argmax(-1), theirs.argmax(-1))


def test_the_linear_layer_that_can_be_captured():
    x, weight = torch.randn(2, 3, 16), torch.randn(5, 16)
    out = torch.full((6, 8), 7.0)
    graphs.blas_linear(out, x, weight)
    torch.testing.assert_close(out[:, :5], x.flatten(0, 1) @ weight.T)
    assert (out[:, 5:] == 7).all()
