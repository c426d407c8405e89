"""Batches that follow one another with nothing read between them."""

from __future__ import annotations

import models
import pytest
import torch

import ds_fp6.integrations.engine as fastgen
from ds_fp6.integrations.deepspeed import batch as batch_hooks

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the bookkeeping is tested on the CPU's engine")

STATE = dict(
    max_ragged_batch_size=96, max_ragged_sequence_count=4, max_tracked_sequences=4,
    memory_config={"mode": "allocate", "size": 6},
)  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    return models.save(models.build("llama_gqa"), tmp_path_factory.mktemp("llama"))


def build(checkpoint):
    return fastgen.build_engine(checkpoint, None, **STATE)


def test_host_buffers_take_turns_and_are_waited_for(checkpoint, monkeypatch):
    """With events that only keep a log: the device of this test copies at once."""
    from deepspeed.accelerator import get_accelerator

    engine, log, buffers = build(checkpoint), [], []

    class Event:
        def record(self):
            self.number = len([line for line in log if line.startswith("copy")])
            log.append(f"copy {self.number}")

        def synchronize(self):
            log.append(f"wait for {self.number}")

    monkeypatch.setattr(type(get_accelerator()), "Event", Event)
    monkeypatch.setattr(type(engine.model().attn), "build_atoms", lambda self, batch: None)
    engine.model().attn._cur_atoms = 0
    for token in range(4):
        fastgen.step(engine, {0: torch.tensor([token])})
        buffers.append(engine._batch._input_ids_shadow.data_ptr())
    assert log == ["copy 0", "copy 1", "wait for 0", "copy 2", "wait for 1", "copy 3"]
    assert buffers[0] == buffers[2] != buffers[1] == buffers[3]


def test_atoms_of_deepspeeds_attention_are_waited_for(checkpoint, monkeypatch):
    from deepspeed.accelerator import get_accelerator

    log = []

    class Event:
        def record(self):
            log.append("copy")

        def synchronize(self):
            log.append("wait")

    engine = build(checkpoint)
    fastgen.step(engine, {0: torch.tensor([1])})
    monkeypatch.setattr(type(get_accelerator()), "Event", Event)
    for _ in range(2):
        engine.model().prepare_batch(engine._batch)
    assert log == ["copy", "wait", "copy"]


def test_a_step_still_under_way_keeps_its_batch(checkpoint, monkeypatch):
    """Copies that take effect only when the next but one batch waits for them, or at the end, arrive unchanged."""
    from deepspeed.accelerator import get_accelerator

    engine, pending, arrived = build(checkpoint), [], []

    def send(staging) -> None:
        host = staging._hosts[staging._current]
        sent = host.clone()
        staging._device.copy_(host)

        class Copy:
            def synchronize(self):
                arrived.append(bool(torch.equal(host, sent)))
                pending.remove(self)

        staging._copied[staging._current] = Copy()
        pending.append(staging._copied[staging._current])

    monkeypatch.setattr(batch_hooks.Staging, "send", send)
    assert get_accelerator().device_name() == "cpu"
    for token in range(5):
        fastgen.step(engine, {uid: torch.arange(token + uid + 1) for uid in range(token % 3 + 1)})
    for copy in list(pending):
        copy.synchronize()
    assert arrived == [True] * 5


def test_logits_outlive_the_next_step(checkpoint):
    engine, alone = build(checkpoint), build(checkpoint)
    first = fastgen.step(engine, {0: torch.arange(5), 1: torch.arange(9)})
    second = fastgen.step(engine, {0: torch.tensor([3]), 1: torch.tensor([4])})
    expected = fastgen.step(alone, {0: torch.arange(5), 1: torch.arange(9)})
    assert torch.equal(first, expected) and not torch.equal(first, second)


def test_blocks_are_freed_without_asking_the_device(checkpoint):
    engine = build(checkpoint)
    before = engine.free_blocks
    fastgen.step(engine, {0: torch.arange(60), 1: torch.arange(9)})
    sequence = engine._state_manager.get_sequence(0)
    on_device = sequence.kv_cache_ids(on_device=True)[0, : sequence.cur_allocated_blocks]
    assert torch.equal(sequence.all_block_ids(), on_device)
    for ids in engine._state_manager._all_block_ids:
        ids.fill_(-1)
    for uid in (0, 1):
        engine.flush(uid)
    assert engine.free_blocks == before


def test_block_numbers_reach_the_device(checkpoint):
    engine = build(checkpoint)
    blocks = []
    for uid in range(3):
        fastgen.step(engine, {uid: torch.arange(60)})
        sequence = engine._state_manager.get_sequence(uid)
        count = sequence.cur_allocated_blocks
        on_device, on_host = (sequence.kv_cache_ids(on_device=where)[0, :count].tolist() for where in (True, False))
        assert on_device == on_host
        blocks += on_host
    assert len(set(blocks)) == len(blocks) == 3
    with pytest.raises(ValueError, match="2 allocation groups, expected 1"):
        sequence.extend_kv_cache([torch.tensor([1]), torch.tensor([2])])
