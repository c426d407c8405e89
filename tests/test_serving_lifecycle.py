"""Starts and ends of ``ds-fp6 serve``: its limits, its drain, two ranks, and what it refuses to start with."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys

import models
import openai
import psutil
import pytest
import torch
from servers import MODEL, PATIENCE, running_server
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPT = "def main("
LONG = {"max_tokens": 400, "temperature": 0, "extra_body": {"ignore_eos": True}}


def start_stream(client, **options):
    """A stream of which the first chunk has come."""
    stream = client.completions.create(model="tiny", prompt=PROMPT, stream=True, **{**LONG, **options})
    next(stream)
    return stream


def rest(stream) -> tuple[int, str | None]:
    """How many more chunks with text a stream has, and how it finishes."""
    chunks = [chunk.choices[0] for chunk in stream]
    return sum(bool(chunk.text) for chunk in chunks), chunks[-1].finish_reason


def test_concurrent_requests_and_drain():
    with running_server("--max-concurrent-requests", "2", "--num-kv-blocks", "32", "--drain-seconds", "50") as server:
        client = server.client()
        streams = [start_stream(client, max_tokens=1000) for _ in range(2)]
        with pytest.raises(openai.RateLimitError, match="--max-concurrent-requests"):
            client.completions.create(model="tiny", prompt=PROMPT, max_tokens=1)
        streams.pop().response.close()
        server.wait_until(lambda m: m["requests_running"] == 1, "the place of the one that left")
        assert client.completions.create(model="tiny", prompt=PROMPT, max_tokens=1).choices
        server.process.send_signal(signal.SIGTERM)
        chunks, finish = rest(streams.pop())
        assert finish == "length" and chunks > 800
        assert server.end() == 0, server.output
        with pytest.raises(openai.APIConnectionError):
            client.models.list()


def test_drain_that_takes_too_long():
    with running_server("--num-kv-blocks", "32", "--drain-seconds", "0") as server:
        stream = start_stream(server.client(), max_tokens=1000)
        server.process.send_signal(signal.SIGTERM)
        assert server.end(PATIENCE) == 0, server.output
        with pytest.raises(Exception, match="peer closed|incomplete|Connection"):
            list(stream)


@pytest.fixture(scope="module")
def two_ranks():
    flags = ["--tensor-parallel-size", "2", "--quantization-mode", "wf6a32", "--num-kv-blocks", "24"]
    with running_server(*flags, "--max-num-batched-tokens", "100", "--drain-seconds", "5") as server:
        yield server


@pytest.fixture(scope="module")
def reference():
    return models.quantize_(AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval(), "wf6a32")


def ranks_of(server) -> list[psutil.Process]:
    return psutil.Process(server.process.pid).children(recursive=True)


def test_two_ranks(two_ranks, reference):
    """In fp32, against transformers: greedy tokens, and the log probabilities of a prompt of several batches."""
    client, tokenizer = two_ranks.client(), AutoTokenizer.from_pretrained(MODEL)
    ids = tokenizer.encode((MODEL / "held_out.txt").read_text()[:1200])
    assert len(ids) > 250
    answer = client.completions.create(
        model="tiny", prompt=[ids, ids[:7]], max_tokens=16, temperature=0, logprobs=0, echo=True
    )
    for prompt, choice in zip((ids, ids[:7]), answer.choices, strict=True):
        new = models.greedy(reference, torch.tensor(prompt), 16)
        assert choice.text == tokenizer.decode(prompt + new)
        with torch.no_grad():
            expected = reference(torch.tensor([prompt + new])).logits[0, :-1].log_softmax(dim=-1)
        own = expected.gather(1, torch.tensor(prompt[1:] + new)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(choice.logprobs.token_logprobs[1:]), own, rtol=0, atol=1e-3)


def test_seeds_under_load(two_ranks):
    """A seed gives the same choices, whatever else is in the batch."""
    client = two_ranks.client()
    options = {"model": "tiny", "prompt": PROMPT, "max_tokens": 40, "temperature": 1.0, "seed": 5, "n": 3}

    def texts() -> list[str]:
        return [choice.text for choice in client.completions.create(**options).choices]

    alone = texts()
    stream = start_stream(client, n=5, temperature=1.0, max_tokens=900)
    assert texts() == alone and len(set(alone)) == 3
    stream.response.close()
    two_ranks.wait_until_idle()


def test_rank_that_is_killed(two_ranks):
    """The last test of its server: every client hears of it, and nothing is left running."""
    [rank] = ranks_of(two_ranks)
    stream = start_stream(two_ranks.client(), max_tokens=900)
    rank.kill()
    with pytest.raises(openai.APIError, match="generation stopped"):
        list(stream)
    assert two_ranks.end(30) == 1
    assert "rank 1 of the model" in two_ranks.output and not rank.is_running()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGKILL, -signal.SIGKILL)])
def test_ranks_end_with_rank_0(number, status):
    flags = ["--tensor-parallel", "2", "--quantization-mode", "none", "--num-kv-blocks", "8"]
    with running_server(*flags) as server:
        [rank] = ranks_of(server)
        answer = server.client().completions.create(model="tiny", prompt=PROMPT, max_tokens=3)
        assert answer.usage.completion_tokens == 3
        server.process.send_signal(number)
        assert server.end() == status, server.output
        rank.wait(PATIENCE)


def refused(*arguments: str, model: str = str(MODEL)) -> str:
    """What a server that does not start prints."""
    process = subprocess.run(
        [sys.executable, "-m", "ds_fp6.cli", "serve", model, *arguments],
        capture_output=True, text=True, timeout=2 * PATIENCE,
    )  # fmt: skip
    assert process.returncode in (1, 2), process.stdout
    return process.stderr


def test_port_in_use():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in refused("--port", str(port))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--quantization-mode", "wf6"], "a mode is w f BITS"),
        (["--max-model-len", "2048"], "max_length 2048 is more than the model's 1024"),
        (["--chat-template", "nothing-here"], "nothing-here"),
        (["--max-num-seqs", "0"], "must be at least 1"),
        (["--api-key", ""], "--api-key is empty"),
        (["--device", "cuda"], "torch finds no CUDA device"),
    ],
)
def test_flags_that_are_refused(flags, message):
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    assert message in refused("--port", "0", "--num-kv-blocks", "8", *flags)
