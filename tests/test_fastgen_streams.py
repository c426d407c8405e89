"""Streams of ``mii.serve`` within one process: what a rank sends for a step, and what the load balancer makes of it."""

from __future__ import annotations

import asyncio
import json
import queue
import threading
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest
import torch
from mii.constants import GenerationFinishReason, TaskType
from mii.grpc_related.proto.modelresponse_pb2 import MultiGenerationReply
from mii.grpc_related.task_methods import TASK_METHODS_DICT
from transformers import AutoTokenizer

from ds_fp6.integrations.mii import cancelling, errors, guard, streams
from ds_fp6.integrations.mii.balancer import Replica, Stream

MODEL = Path(__file__).parent.parent / "examples" / "tiny-python-llama"
GOING_ON, STOP = GenerationFinishReason.NONE, GenerationFinishReason.STOP
PROMISED = 30  # seconds


class Pipeline:
    """What of ``MIIAsyncPipeline`` a call touches. Prompts are their own tokens; "bad" is refused."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.result_queues, self.request_queue = {}, queue.Queue()
        self.tokenizer = SimpleNamespace(encode=lambda prompt: prompt)
        cancelling.start(self)

    def make_request(self, key: int, uid: int, tokens: str, options: dict) -> SimpleNamespace:
        if tokens == "bad":
            raise ValueError("the prompt is bad")
        return SimpleNamespace(tid=key, uid=uid, tokens=tokens, options=options)


class Call:
    """A call from the load balancer: ``ask`` sends a request, ``messages`` are what comes back."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._requests: queue.Queue = queue.Queue()
        self._ended = lambda: None
        self.messages = streams.carry(pipeline, iter(self._requests.get, None), self)

    def add_callback(self, ended) -> None:
        self._ended = ended

    def ask(self, number: int, prompt: str, **options) -> None:
        methods = TASK_METHODS_DICT[TaskType.TEXT_GENERATION]
        request = methods.pack_request_to_proto([prompt], **options).SerializeToString()
        self._requests.put(streams.message(number, request))

    def cancel(self, number: int) -> None:
        self._requests.put(streams.message(number))

    def end(self) -> None:
        self._ended()
        self._requests.put(None)


def put(pipeline: Pipeline, request: SimpleNamespace, tokens: list[int], generated: int, reason) -> None:
    outputs = [torch.tensor(token) for token in tokens]
    pipeline.result_queues[request.tid].put_nowait((request.uid, outputs, 3, generated, reason, True))


def test_a_step_is_one_message_whatever_it_holds():
    pipeline = Pipeline()
    call = Call(pipeline)
    call.ask(5, "one", max_new_tokens=9)
    call.ask(6, "bad")
    assert json.loads(next(call.messages)) == [[6, "the prompt is bad"]]
    call.ask(2**40, "two")
    one, two = (pipeline.request_queue.get(timeout=PROMISED) for _ in range(2))
    assert (one.tokens, two.tokens) == ("one", "two")
    assert one.options == {"max_new_tokens": 9, "stream": True}

    put(pipeline, one, [11], 1, GOING_ON)
    put(pipeline, two, [21], 1, GOING_ON)
    going_on = GOING_ON.value
    assert json.loads(next(call.messages)) == [[5, [11], 3, 1, going_on], [2**40, [21], 3, 1, going_on]]
    put(pipeline, one, [12], 2, GOING_ON)
    put(pipeline, one, [], 2, STOP)
    assert json.loads(next(call.messages)) == [[5, [12], 3, 2, going_on], [5, [], 3, 2, STOP.value]]

    call.end()
    put(pipeline, two, [22], 2, GOING_ON)  # nobody takes it, and nobody minds
    assert list(call.messages) == [] and pipeline.result_queues[two.tid].empty()
    assert list(pipeline._cancelled) == [two.uid]  # nobody waits for it


def test_a_cancelled_stream_gets_nothing_more():
    pipeline = Pipeline()
    call = Call(pipeline)
    for number, prompt in ((1, "one"), (2, "two"), (3, "bad")):
        call.ask(number, prompt)
    assert json.loads(next(call.messages)) == [[3, "the prompt is bad"]]
    one, two = (pipeline.request_queue.get(timeout=PROMISED) for _ in range(2))
    call.cancel(1)
    call.cancel(9)  # never heard of
    call.ask(4, "bad")
    assert json.loads(next(call.messages)) == [[4, "the prompt is bad"]]
    assert list(pipeline._cancelled) == [one.uid]
    put(pipeline, one, [11], 1, STOP)  # had been chosen when it was cancelled
    put(pipeline, two, [21], 1, GOING_ON)
    going_on = [2, [21], 3, 1, GOING_ON.value]
    found = json.loads(next(call.messages))
    assert (found or json.loads(next(call.messages))) == [going_on]
    call.end()


def test_a_failure_of_the_generation_thread_ends_the_call():
    pipeline = Pipeline()
    call = Call(pipeline)
    call.ask(1, "one")
    failure = RuntimeError("out of blocks")
    threading.Thread(target=lambda: _fail(pipeline, failure)).start()
    with pytest.raises(RuntimeError, match="generation stopped because of RuntimeError: out of blocks"):
        next(call.messages)
    call.end()
    with pytest.raises(RuntimeError, match="generation stopped"):
        next(Call(pipeline).messages)


def _fail(pipeline: Pipeline, failure: Exception) -> None:
    request = pipeline.request_queue.get(timeout=PROMISED)
    pipeline._failure = failure
    pipeline.result_queues[request.tid].put(failure)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


def test_what_comes_meanwhile_goes_out_together(tokenizer):
    text = "def naïve(x):\n    return '½ 🐍'\n"
    tokens = tokenizer.encode(text, add_special_tokens=False)
    assert len(tokens) > 8

    async def talk() -> list[MultiGenerationReply]:
        stream, replies = Stream(), []
        stream.add(tokens[:1], 4, 1, str(GOING_ON.value), False)
        async for reply in stream.replies(tokenizer.decode):
            replies.append(MultiGenerationReply.FromString(reply).response[0])
            if len(replies) == 1:  # while it is under way
                for i, token in enumerate(tokens[1:], 2):
                    stream.add([token], 4, i, str(GOING_ON.value), False)
                stream.add([], 4, len(tokens), str(STOP.value), True)
        return replies

    first, second = asyncio.run(talk())
    assert (first.generated_tokens, first.prompt_tokens) == (1, 4) and first.finish_reason == str(GOING_ON.value)
    assert (second.generated_tokens, second.finish_reason) == (len(tokens), str(STOP.value))
    assert first.response + second.response == text


def test_a_failed_stream_raises_what_it_failed_with(tokenizer):
    async def talk() -> None:
        stream = Stream()
        asyncio.get_running_loop().call_later(0.01, stream.fail, RuntimeError("the server is gone"))
        await anext(stream.replies(tokenizer.decode))

    with pytest.raises(RuntimeError, match="the server is gone"):
        asyncio.run(talk())


BROKEN = [
    ("UNAVAILABLE", "refused"), ("UNKNOWN", "Stream removed (Socket closed)"), ("INTERNAL", "Internal error from Core"),
]  # fmt: skip


@pytest.mark.parametrize("code, text", BROKEN)
def test_a_connection_that_broke_says_why(code, text, tmp_path):
    error = grpc.aio.AioRpcError(grpc.StatusCode[code], grpc.aio.Metadata(), grpc.aio.Metadata(), text)
    assert str(errors.readable(error, None)) == f"the server is gone: {text}"
    (tmp_path / "failure.txt").write_text("replica 0 was ended by SIGKILL")
    assert str(errors.readable(error, tmp_path)) == "the server is gone: replica 0 was ended by SIGKILL"


def test_streams_that_come_after_a_failure_fail_too(tokenizer, tmp_path, monkeypatch):
    """While the first one's reason is looked for, which takes as long as a guard may need."""
    monkeypatch.setattr(errors, "NOTICE", 2)
    monkeypatch.setenv(guard.VARIABLE, str(tmp_path))
    calls = []

    async def fail(requests, context):
        calls.append(await anext(requests))
        await context.abort(grpc.StatusCode.UNAVAILABLE, "no rank")
        yield b""

    async def one(replica: Replica) -> None:
        async with replica.stream(b"request") as stream:
            async for _ in stream.replies(tokenizer.decode):
                pytest.fail("a reply")

    async def talk() -> list:
        server = grpc.aio.server()
        handlers = {streams.METHOD: grpc.stream_stream_rpc_method_handler(fail)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(streams.SERVICE, handlers),))
        replica = Replica("localhost", [server.add_insecure_port("localhost:0")])
        await server.start()
        first = asyncio.create_task(one(replica))
        while not calls:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.5)
        assert not first.done()
        found = await asyncio.wait_for(asyncio.gather(first, one(replica), return_exceptions=True), PROMISED)
        await server.stop(None)
        return found

    assert [str(error) for error in asyncio.run(talk())] == ["the server is gone: no rank"] * 2
    assert calls == [streams.message(0, b"request"), streams.message(1, b"request")]
