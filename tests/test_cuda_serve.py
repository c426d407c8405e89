"""``mii.serve`` on GPUs: its failures reach the client, and nothing is left of it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import mii
import pytest
import torch
from deployments import ports, score_files  # noqa: F401  (fixtures)
from deployments import GREEDY, LONG, MODEL, PROMPTLY, PROMPTS, assert_gone, ranks, stream_all

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

#: Takes the first GPU's memory but for so many bytes, says so, and keeps it until its input ends.
_HOARD = """
import sys, torch
torch.cuda.init()
kept = torch.empty(torch.cuda.mem_get_info()[0] - int(sys.argv[1]), dtype=torch.uint8, device="cuda")
print("taken", flush=True)
sys.stdin.read()
"""


def serve(**arguments):
    return mii.serve(MODEL, quantization_mode="wf6af16", **arguments)


def test_more_ranks_than_gpus(ports):
    degree = torch.cuda.device_count() + 1
    with pytest.raises(ValueError, match=f"tensor_parallel {degree} .*needs {degree} devices, there are {degree - 1}"):
        serve(tensor_parallel=degree, **ports)
    assert_gone(ports)


def test_a_degree_that_does_not_divide_the_heads(tmp_path, ports):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    config = json.loads(Path(MODEL, "config.json").read_text())
    config |= {"num_attention_heads": 3, "num_key_value_heads": 3, "hidden_size": 3 * config["head_dim"]}
    Path(tmp_path, "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="cannot be split over 2 ranks"):
        mii.serve(str(tmp_path), load_format="dummy", tensor_parallel=2, **ports)
    assert_gone(ports)


@pytest.mark.parametrize("degree", [1, 2])
def test_a_port_in_use_and_a_killed_rank(degree, ports):
    if torch.cuda.device_count() < degree:
        pytest.skip(f"needs {degree} GPUs")
    client = serve(deployment_name=f"ranks{degree}", tensor_parallel=degree, **ports)
    lengths = [answer.generated_length for answer in client.generate(PROMPTS, **GREEDY)]
    assert lengths == [GREEDY["max_new_tokens"]] * len(PROMPTS)
    with pytest.raises(OSError, match=rf"port {ports['port_number']} \(port_number\) is in use"):
        serve(deployment_name="another", **ports)
    start = time.monotonic()
    found = stream_all(client, PROMPTS, kill=ranks()[-1], **LONG)
    took = time.monotonic() - start
    assert all(isinstance(text, RuntimeError) for text in found), found
    assert all("the server is gone" in str(text) or "generation stopped" in str(text) for text in found), found
    assert took < PROMPTLY
    assert_gone(ports)
    print(f"\ntensor_parallel={degree}, killed: {took:.1f} s, {found[0]}")


def test_no_memory_left_for_the_kv_cache(ports):
    hoard = subprocess.Popen(
        [sys.executable, "-c", _HOARD, str(10**9)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert hoard.stdout.readline() == "taken\n"
        start = time.monotonic()
        problem = "did not start: replica 0 ended with status 1: .*Insufficient memory"
        with pytest.raises(RuntimeError, match=problem) as raised:
            serve(deployment_name="full", **ports)
        took = time.monotonic() - start
        assert_gone(ports)
    finally:
        hoard.communicate("")
    print(f"\nno memory: {took:.1f} s, {raised.value}")
    assert took < PROMPTLY
