"""``mii.serve`` on a CPU: a server of its own processes, its client, streams, errors and end."""

from __future__ import annotations

import socket
import time

import mii
import models
import pytest


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("localhost", port)) == 0


@pytest.fixture
def ports() -> dict[str, int]:
    """MII takes the ports after ``port_number`` for its ranks."""
    port = free_port()
    while listening(port + 1) or listening(port + 2):
        port = free_port()
    return {"port_number": port, "torch_dist_port": free_port(), "zmq_port_number": free_port()}


@pytest.fixture
def score_files(tmp_path, monkeypatch):
    """Where MII keeps what it knows of a deployment."""
    monkeypatch.setenv("MII_CACHE_PATH", str(tmp_path / "mii"))


def test_server(tmp_path, ports, score_files):
    """Of two ranks."""
    path = models.save(models.build("llama"), tmp_path / "model")
    client = mii.serve(path, deployment_name="ds-fp6-test", quantization_mode="wf6a32", tensor_parallel=2, **ports)
    try:
        greedy = {"max_new_tokens": 12, "do_sample": False, "ignore_eos": True}
        answers = client.generate(["def main(", "import"], **greedy)
        assert [answer.generated_length for answer in answers] == [12, 12]
        pieces = []
        client.generate("def main(", streaming_fn=lambda answer: pieces.append(answer[0].generated_text), **greedy)
        assert "".join(pieces) == answers[0].generated_text
        for streaming in (None, pieces.append):
            start = time.monotonic()
            with pytest.raises(Exception, match="the prompt has 3000 tokens"):
                client.generate("x" * 3000, streaming_fn=streaming, **greedy)
            assert time.monotonic() - start < 60  # not the ten minutes of a stream that nobody ends
        assert client.generate(["import"], **greedy)[0].generated_text == answers[1].generated_text
    finally:
        client.terminate_server()
    deadline = time.monotonic() + 60
    while (listening(ports["port_number"]) or listening(ports["port_number"] + 1)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not listening(ports["port_number"]) and not listening(ports["port_number"] + 1)


def test_refused_before_a_process_is_launched(tmp_path, monkeypatch, score_files):
    from mii.backend.server import MIIServer

    monkeypatch.setattr(MIIServer, "_launch_server_process", lambda *args, **kwargs: pytest.fail("launched"))
    with pytest.raises(ValueError, match="a mode is w f BITS"):
        mii.serve(str(tmp_path), quantization_mode="wf6")
    with pytest.raises(FileNotFoundError, match="nothing-here"):
        mii.serve(str(tmp_path / "nothing-here"))


def test_server_that_does_not_start_leaves_nothing_behind(tmp_path, ports, score_files, monkeypatch):
    from mii.backend.server import MIIServer

    launched = []
    launch = MIIServer._launch_server_process

    def remember(self, *args, **kwargs):
        launched.append(launch(self, *args, **kwargs))
        return launched[-1]

    monkeypatch.setattr(MIIServer, "_launch_server_process", remember)
    path = models.save(models.build("llama"), tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(RuntimeError, match="server crashed"):
        mii.serve(path, deployment_name="ds-fp6-broken", **ports)
    assert len(launched) == 2 and all(process.poll() is not None for process in launched)
