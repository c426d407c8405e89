"""Deployments of ``mii.serve`` as tests see them: their ports, their processes and their streams."""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path

import psutil
import pytest

from ds_fp6.integrations.mii import entry
from ds_fp6.integrations.mii.ports import free_ports, is_free

MODEL = str(Path(__file__).parent.parent / "examples" / "tiny-python-llama")
PROMPTS = ["def main(", "import os\n", "class Stack:", "for i in", "    return", "# ", "if __name__", "try:\n"]
GREEDY = {"max_new_tokens": 12, "do_sample": False, "ignore_eos": True}
LONG = GREEDY | {"max_new_tokens": 450}
#: Seconds in which a failure must have reached the client, and all processes must be gone.
PROMPTLY = 30


@pytest.fixture(scope="module")
def ports() -> dict[str, int]:
    """MII takes the ports after ``port_number`` for its ranks, and one in a hundred for each replica's rendezvous."""
    while True:
        dist = free_ports(1)
        if is_free(dist + 100):
            return {"port_number": free_ports(4), "torch_dist_port": dist, "zmq_port_number": free_ports(2)}


@pytest.fixture(autouse=True)
def score_files(tmp_path, monkeypatch):
    """Where MII keeps what it knows of a deployment."""
    monkeypatch.setenv("MII_CACHE_PATH", str(tmp_path / "mii"))


def processes() -> list[psutil.Process]:
    """This test's deployments: guards and all that they started."""
    return [p for p in psutil.Process().children(recursive=True) if "mii" in " ".join(command(p))]


def command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def ranks() -> list[psutil.Process]:
    """The processes that hold a model, without their launchers, by their ports and ranks."""
    found = [p for p in processes() if command(p)[1:3] == ["-m", entry.__name__] and "--server-port" in command(p)]

    def place(process: psutil.Process) -> tuple[int, int]:
        words = command(process)
        return int(words[words.index("--server-port") + 1]), int(process.environ()["LOCAL_RANK"])

    return sorted(found, key=place)


def assert_gone(ports: dict[str, int]) -> None:
    deadline = time.monotonic() + PROMPTLY
    taken = list(range(ports["port_number"], ports["port_number"] + 3)) + [ports["torch_dist_port"]]
    while (processes() or not all(map(is_free, taken))) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [command(p)[:4] for p in processes()]
    assert all(map(is_free, taken))


def stream_all(client, prompts: list[str], kill: psutil.Process | None = None, **options) -> list:
    """Text or exception of each prompt, all streaming at once; kills a process once all of them have begun."""
    begun = []

    async def one(prompt: str) -> str:
        pieces = []
        async for answer in client._request_async_response_stream([prompt], stream=True, **options):
            if not pieces:
                begun.append(prompt)
            pieces.append(answer[0].generated_text)
            if kill and len(begun) == len(prompts):
                with contextlib.suppress(psutil.NoSuchProcess):  # killed before
                    kill.kill()
        return "".join(pieces)

    async def gather() -> list:
        return await asyncio.gather(*map(one, prompts), return_exceptions=True)

    return client.asyncio_loop.run_until_complete(gather())
