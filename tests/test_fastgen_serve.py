"""``mii.serve`` on a CPU: servers of their own processes, their clients, streams, errors and ends."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import mii
import models
import psutil
import pytest
from deployments import ports, score_files  # noqa: F401  (fixtures)
from deployments import (
    GREEDY, LONG, MODEL, PROMPTLY, PROMPTS, assert_gone, command, free_ports, processes, ranks, stream_all,
)  # fmt: skip
from mii.backend.server import MIIServer

from ds_fp6.integrations.mii import guard, server
from ds_fp6.integrations.mii import ports as chosen
from ds_fp6.integrations.mii.ports import answers, free_ports, is_free


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """For each process."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def post(port: int, deployment: str, body: dict) -> list[dict]:
    request = urllib.request.Request(
        f"http://localhost:{port}/mii/{deployment}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def test_two_replicas_one_of_which_is_killed(ports):
    rest = free_ports(1)
    pipeline = mii.pipeline(MODEL, quantization_mode="wf6af16")
    expected = [answer.generated_text for answer in pipeline(PROMPTS, **GREEDY)]
    pipeline.destroy()
    client = mii.serve(
        MODEL, deployment_name="replicas", quantization_mode="wf6af16", replica_num=2, enable_restful_api=True,
        restful_api_port=rest, restful_processes=2, **ports,
    )  # fmt: skip
    assert stream_all(client, PROMPTS, **GREEDY) == expected
    assert [answer.generated_text for answer in client.generate(PROMPTS, **GREEDY)] == expected
    answers = post(rest, "replicas", {"prompts": PROMPTS[:2], **GREEDY})
    assert [answer["generated_text"] for answer in answers] == expected[:2]
    with pytest.raises(urllib.error.HTTPError, match="500"):
        post(rest, "replicas", {"prompts": ["x" * 100_000], **GREEDY})
    with pytest.raises(OSError, match=rf"port {ports['port_number']} \(port_number\) is in use"):
        mii.serve(MODEL, deployment_name="another", **ports)

    assert sum(rank.cpu_percent(0.5) for rank in ranks()) < 30  # they wait for requests, and do not ask all the time
    start = time.monotonic()
    found = stream_all(client, PROMPTS, kill=ranks()[0], **LONG)
    assert time.monotonic() - start < PROMPTLY
    failed = [str(text) for text in found if isinstance(text, Exception)]
    assert len(failed) >= len(PROMPTS) // 2
    assert not [text for text in failed if not text.startswith("the server is gone: replica 0 was ended by SIGKILL")]
    with pytest.raises(RuntimeError, match="the server is gone: replica 0"):
        mii.client("replicas").generate(["import"], **GREEDY)
    assert_gone(ports)
    assert is_free(rest)


@pytest.mark.parametrize("end", ["terminate", "kill"])
def test_two_ranks(end, tmp_path, ports):
    """On the ports of a server that is no more."""
    path = models.save(models.build("llama"), tmp_path / "model")
    client = mii.serve(path, deployment_name="ranks", quantization_mode="wf6a32", tensor_parallel=2, **ports)
    answers = client.generate(["def main(", "import"], **GREEDY)
    assert [answer.generated_length for answer in answers] == [12, 12]
    if end == "kill":
        start = time.monotonic()
        (error,) = stream_all(client, ["def main("], kill=ranks()[1], **LONG)
        assert isinstance(error, RuntimeError) and time.monotonic() - start < PROMPTLY
        assert "the server is gone" in str(error) or "generation stopped" in str(error)
        assert_gone(ports)
        return
    pieces = []
    client.generate("def main(", streaming_fn=lambda answer: pieces.append(answer[0].generated_text), **GREEDY)
    assert "".join(pieces) == answers[0].generated_text
    for streaming in (None, pieces.append):
        start = time.monotonic()
        with pytest.raises(Exception, match="the prompt has 3000 tokens"):
            client.generate("x" * 3000, streaming_fn=streaming, **GREEDY)
        assert time.monotonic() - start < PROMPTLY  # not the ten minutes of a stream that nobody ends
    assert client.generate(["import"], **GREEDY)[0].generated_text == answers[1].generated_text
    client.asyncio_loop.run_until_complete(hang_up(client))
    assert client.generate(["import"], **GREEDY)[0].generated_text == answers[1].generated_text
    client.terminate_server()
    assert_gone(ports)


async def hang_up(client) -> None:
    stream = client._request_async_response_stream(["def main("], stream=True, **LONG)
    assert (await anext(stream))[0].generated_length >= 1
    await stream.aclose()


def test_a_killed_guard_takes_the_server_with_it(tmp_path, ports):
    path = models.save(models.build("llama"), tmp_path / "model")
    client = mii.serve(path, deployment_name="guarded", load_format="dummy", **ports)
    (guarding,) = [p for p in processes() if guard.__name__ in command(p)]
    others = [p for p in processes() if p != guarding]
    assert len(others) >= 3
    guarding.kill()
    gone, alive = psutil.wait_procs(others, timeout=PROMPTLY)
    assert not alive
    with pytest.raises(RuntimeError, match="the server is gone"):
        client.generate(["def main("], **GREEDY)
    assert_gone(ports)


def test_refused_before_a_process_is_launched(tmp_path, monkeypatch, ports):
    monkeypatch.setattr(MIIServer, "_launch_server_process", lambda *args, **kwargs: pytest.fail("launched"))
    with pytest.raises(ValueError, match="a mode is w f BITS"):
        mii.serve(str(tmp_path), quantization_mode="wf6")
    with pytest.raises(FileNotFoundError, match="nothing-here"):
        mii.serve(str(tmp_path / "nothing-here"))
    with pytest.raises(ValueError, match="cannot be split over 3 ranks"):
        mii.serve(MODEL, tensor_parallel=3, **ports)
    same = ports | {"torch_dist_port": ports["port_number"]}
    with pytest.raises(ValueError, match=f"port {ports['port_number']} is wanted 2 times"):
        mii.serve(MODEL, **same)


@pytest.mark.parametrize("broken", ["weights", "kv"])
def test_a_server_that_does_not_start_says_why_and_leaves_nothing_behind(broken, tmp_path, ports, monkeypatch):
    path = models.save(models.build("llama"), tmp_path / "model")
    if broken == "weights":
        (tmp_path / "model" / "model.safetensors").unlink()
        problem = "model.safetensors"
    else:
        monkeypatch.setenv("DS_FP6_KV_MEMORY", "1K")
        # The server is hooked all the same: the problem is in this package's words.
        monkeypatch.setenv("DS_FP6_AUTOLOAD", "0")
        problem = "the KV cache may take 1024 bytes, less than one block"
    with pytest.raises(RuntimeError, match=f"did not start: replica 0 ended with status 1: .*{problem}"):
        mii.serve(path, deployment_name=broken, **ports)
    assert_gone(ports)


def test_a_port_that_only_answers_itself_is_not_taken_for_a_server(ports, monkeypatch):
    class SelfConnected(socket.socket):
        def connect_ex(self, address) -> int:
            self.bind(address)
            return super().connect_ex(address)

    port = ports["port_number"]
    assert not answers("127.0.0.1", port)
    with monkeypatch.context() as patch:
        patch.setattr(socket, "socket", SelfConnected)
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port + 1)) == 0
        assert not answers("127.0.0.1", port)
    with socket.create_server(("127.0.0.1", port + 2)):
        assert answers("127.0.0.1", port + 2)


@pytest.mark.parametrize("connections, below", [("32768\t60999\n", 32768), ("1024\t65535\n", 65536)])
def test_ports_are_none_of_connections_where_there_are_others(connections, below, tmp_path, monkeypatch):
    monkeypatch.setattr(chosen, "LINUX_SAYS", tmp_path / "range")
    chosen.LINUX_SAYS.write_text(connections)
    for _ in range(50):
        first = free_ports(3)
        assert chosen.LOWEST <= first and first + 3 <= below and all(map(is_free, range(first, first + 3)))


def test_a_server_runs_on_the_gpus_that_its_process_sees(monkeypatch):
    from mii.config import ReplicaConfig

    replica = ReplicaConfig(hostname="localhost", torch_dist_port=29500, gpu_indices=[0, 1])

    def command(seen: str) -> list[str]:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
        return MIIServer._generate_ds_launch_str(None, replica, "hostfile", False).split(" ")

    cpu = command("2,3")
    assert cpu[0] == sys.executable and cpu[cpu.index("-i") + 1] == "localhost:0,1"
    monkeypatch.setattr(server, "on_cpu", lambda: False)
    masked = command("2, 3")
    assert masked[:4] == ["env", "-u", "CUDA_VISIBLE_DEVICES", sys.executable]
    assert masked[masked.index("-i") + 1] == "localhost:2,3"
    assert command("")[0] == sys.executable
    with pytest.raises(ValueError, match="GPU-8f3a"):
        command("GPU-8f3a,GPU-77b1")


def test_a_guard_ends_what_lost_its_parent(tmp_path):
    nested = "import os, subprocess, time; subprocess.Popen(['sleep', '1000']); open('started', 'w'); time.sleep(1000)"
    guarding = subprocess.Popen(
        [sys.executable, "-m", guard.__name__, str(tmp_path)], stdin=subprocess.PIPE, cwd=tmp_path
    )  # fmt: skip
    try:
        guarding.stdin.write(json.dumps([["replica 0", [sys.executable, "-c", nested]]]).encode())
        guarding.stdin.close()
        deadline = time.monotonic() + PROMPTLY
        while not (tmp_path / "started").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        parent, child = psutil.Process(guarding.pid).children(recursive=True)
        parent.kill()  # a failure, after which its child is an orphan
        assert guarding.wait(PROMPTLY) == 1
        assert guard.failure(tmp_path) == "replica 0 was ended by SIGKILL"
        assert not child.is_running()
    finally:
        guarding.terminate()


def test_a_guard_ends_with_its_owner(tmp_path):
    owner = subprocess.Popen(["sleep", "1000"])
    guarding = subprocess.Popen(
        [sys.executable, "-m", guard.__name__, str(tmp_path)], stdin=subprocess.PIPE,
        env={**os.environ, guard.OWNER_VARIABLE: str(owner.pid)},
    )  # fmt: skip
    try:
        guarding.stdin.write(json.dumps([["replica 0", ["sleep", "1000"]]]).encode())
        guarding.stdin.close()
        owner.kill()  # and not waited for
        assert guarding.wait(PROMPTLY) == 0
        assert guard.failure(tmp_path) is None
    finally:
        owner.wait()
        guarding.kill()


def test_a_deployments_configuration_is_the_one_last_written(tmp_path, monkeypatch):
    from mii.constants import DeploymentType
    from mii.utils import import_score_file

    path = tmp_path / "score.py"
    monkeypatch.setattr(mii.utils, "generated_score_path", lambda *_: str(path))
    for ranks in (2, 3):
        path.write_text(f"ranks = {ranks}\n")
        os.utime(path, (1e9, 1e9))
        assert import_score_file("name", DeploymentType.LOCAL).ranks == ranks


def test_exit_statuses_are_named():
    assert guard.status_text(-9) == guard.status_text(247) == "was ended by SIGKILL"
    assert guard.status_text(1) == "ended with status 1"
