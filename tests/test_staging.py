"""Host memory to a device through buffers: what arrives is what was sent. On a CPU the same code, without a GPU's order."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from ds_fp6.integrations import engine  # noqa: F401  (first: importing DeepSpeed imports the package below)
from ds_fp6.integrations.checkpoint import staging
from ds_fp6.integrations.checkpoint.joins import interleave_rows

DEVICES = [
    torch.device("cpu"),
    pytest.param(
        torch.device("cuda", 0),
        marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    ),
]
by_device = pytest.mark.parametrize("device", DEVICES, ids=str)


@pytest.fixture
def small_buffers(monkeypatch):
    monkeypatch.setattr(staging, "BUFFER_BYTES", 4096)


@pytest.fixture
def threads(device, small_buffers):
    made = staging.Staging(device)
    yield made
    made.close()


@by_device
@pytest.mark.parametrize("shape", [(1000, 64), (333, 3, 7), (2049,), (3, 1023)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rows_arrive(threads, device, shape, dtype):
    source = torch.randn(shape).to(dtype)
    for destination in (
        torch.full(shape, float("nan"), dtype=dtype, device=device),
        torch.full(shape, float("nan"), dtype=torch.float32, device=device),
        torch.full((2 * shape[0], *shape[1:]), float("nan"), dtype=dtype, device=device)[1::2],
    ):
        assert threads.takes(destination, source)
        threads.copy(destination, source)
        assert torch.equal(destination.cpu(), source.to(destination.dtype))


@by_device
def test_what_it_leaves_to_torch(threads, device):
    source = torch.randn(1000, 64)
    destination = torch.empty(1000, 64, device=device)
    assert threads.takes(destination, source)
    assert not threads.takes(destination, source.t().contiguous().t())
    assert not threads.takes(destination[:10], source[:10]), "less than a buffer"
    assert not threads.takes(torch.empty(2, 32000, device=device), source.view(2, 32000)), "a row larger than a buffer"
    assert not threads.takes(destination, source[0]), "another shape"


@by_device
def test_a_failed_copy_is_raised_and_the_next_one_works(threads, device):
    source = torch.randn(1000, 64)
    with pytest.raises(RuntimeError):
        threads.copy(torch.empty(1000, 63, device=device), source)
    destination = torch.empty(1000, 64, device=device)
    for _ in range(3):  # a buffer that had not been given back would be missing here
        threads.copy(destination.zero_(), source)
        assert torch.equal(destination.cpu(), source)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_copies_are_in_the_streams_order(small_buffers):
    """Buffers are filled again while the device is late, and what follows on the stream sees all rows."""
    device = torch.device("cuda", 0)
    gate, up = torch.randn(4000, 1024), torch.randn(4000, 1024)
    with staging.staged(device), torch.cuda.stream(torch.cuda.Stream(device)):
        torch.cuda._sleep(200_000_000)
        moved = staging.to(gate, device)
        doubled = moved * 2
        joined = torch.full((8000, 1024), float("nan"), device=device)
        staging.copy_(joined[0::2], gate)
        staging.copy_(joined[1::2], up)
        torch.cuda.current_stream().synchronize()
    assert torch.equal(doubled.cpu(), gate * 2)
    assert torch.equal(joined.cpu(), torch.stack([gate, up], dim=1).view(8000, 1024))


def test_nothing_is_staged_on_a_cpu():
    source = torch.randn(4000, 1024)
    with staging.staged(torch.device("cpu")):
        assert staging.to(source, torch.device("cpu")) is source
        assert torch.equal(interleave_rows(source, -source)[1::2].cpu(), -source)


def test_each_thread_stages_for_itself(monkeypatch):
    """As models that load side by side need: one that has loaded must not end the other one's threads."""
    asked = []
    monkeypatch.setattr(staging.Staging, "takes", lambda *_: asked.append("takes"))
    destination, source = torch.zeros(3), torch.ones(3)
    with staging.staged(torch.device("cuda", 0)), ThreadPoolExecutor(1) as other:
        other.submit(staging.copy_, destination, source).result()
        assert asked == [] and torch.equal(destination, source)
        staging.copy_(destination, source)
        assert asked == ["takes"]
