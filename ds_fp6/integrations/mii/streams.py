"""All streams of a load balancer over one call to a replica, with one message for all tokens of a step.

MII's server has a thread and a message of gRPC for each stream and token. They share the interpreter with the thread that
starts the steps: from some 3000 tokens a second on that was the limit, whatever the GPU. What is left to a rank here is to
pass on token ids; text is made of them in the load balancer (``balancer.py``), which is another process.

To the rank: a stream's number in 8 bytes, and its ``MultiStringRequest``, or nothing: then the stream is cancelled. From it: JSON, a list of
``[number, token ids, tokens of the prompt, tokens generated so far, finish reason]`` and ``[number, error]``.
"""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ds_fp6.integrations.mii import cancelling
from ds_fp6.integrations.mii.pipeline import check_running
from ds_fp6.integrations.patching import Hook, wrap

SERVICE, METHOD = "ds_fp6.Streams", "Carry"
NUMBER_BYTES = 8

#: Stand in for the thread ids by which MII finds the queue of a request's outputs.
_keys = itertools.count(-1, -1)
#: Of the requests. MII's own are random, below 10000, and used again.
_uids = itertools.count(1 << 20)


def message(number: int, request: bytes = b"") -> bytes:
    """What asks a rank for a stream. ``request``: a serialized ``MultiStringRequest`` with one prompt; none cancels it."""
    return number.to_bytes(NUMBER_BYTES, "little") + request


@dataclass(frozen=True)
class Refusal:
    """A request that MII did not take."""

    number: int
    error: str


class Outbox:
    """Outputs of all streams of a call: stands in for a queue of ``MIIAsyncPipeline.result_queues``."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._outputs: list[Any] = []
        self._closed = False

    def put(self, output: Any) -> None:
        """Nobody takes what comes after ``close``."""
        with self._changed:
            if not self._closed:
                self._outputs.append(output)
                self._changed.notify()

    put_nowait = put

    def empty(self) -> bool:
        return not self._outputs

    def close(self) -> None:
        with self._changed:
            self._closed, self._outputs = True, []
            self._changed.notify()

    def take(self) -> list[Any] | None:
        """All that has been put since the last time, as soon as that is something; None once closed."""
        with self._changed:
            while not self._outputs and not self._closed:
                self._changed.wait()
            outputs, self._outputs = self._outputs, []
            return None if self._closed else outputs


def carry(pipeline: Any, requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
    """The call: its messages, until the load balancer ends it. Raises ``RuntimeError`` once generation has failed."""
    outbox, key = Outbox(), next(_keys)
    context.add_callback(outbox.close)
    with pipeline.lock:
        pipeline.result_queues[key] = outbox
    check_running(pipeline)
    numbers: dict[int, int] = {}  # of the streams, by the requests' uids
    threading.Thread(target=_submit_all, args=(pipeline, key, numbers, requests), daemon=True).start()
    try:
        while (outputs := outbox.take()) is not None:
            entries = [_entry(pipeline, numbers, output) for output in outputs]
            yield json.dumps([entry for entry in entries if entry is not None]).encode()
    finally:
        outbox.close()
        for uid in list(numbers):
            cancelling.cancel(pipeline, uid)


def _submit_all(pipeline: Any, key: int, numbers: dict[int, int], requests: Iterator[bytes]) -> None:
    outbox = pipeline.result_queues[key]
    try:
        for received in requests:
            number, request = int.from_bytes(received[:NUMBER_BYTES], "little"), received[NUMBER_BYTES:]
            try:
                if request:
                    _submit(pipeline, key, numbers, number, request)
                else:
                    _cancel(pipeline, numbers, number)
            except Exception as error:
                outbox.put(Refusal(number, str(error)))
    except Exception:
        # The load balancer is gone, or ended the call.
        outbox.close()


def _submit(pipeline: Any, key: int, numbers: dict[int, int], number: int, request: bytes) -> None:
    """``MIIAsyncPipeline.put_request``, but that its outputs come to the outbox."""
    from mii.constants import TaskType
    from mii.grpc_related.proto import modelresponse_pb2
    from mii.grpc_related.task_methods import TASK_METHODS_DICT

    check_running(pipeline)
    parsed = modelresponse_pb2.MultiStringRequest.FromString(request)
    (prompt, *_), options = TASK_METHODS_DICT[TaskType.TEXT_GENERATION].unpack_request_from_proto(parsed)
    uid = next(_uids)
    made = pipeline.make_request(key, uid, pipeline.tokenizer.encode(prompt), options | {"stream": True})
    numbers[uid] = number
    pipeline.request_queue.put(made)
    # It may have failed since, and not have seen the request.
    check_running(pipeline)


def _cancel(pipeline: Any, numbers: dict[int, int], number: int) -> None:
    for uid, other in list(numbers.items()):
        if other == number and numbers.pop(uid, None) is not None:
            cancelling.cancel(pipeline, uid)


def _entry(pipeline: Any, numbers: dict[int, int], output: Any) -> list[Any] | None:
    """What the load balancer gets of an output: nothing of a stream that it has cancelled."""
    from mii.constants import GenerationFinishReason

    if isinstance(output, Refusal):
        return [output.number, output.error]
    if isinstance(output, BaseException):
        check_running(pipeline)
        raise output
    uid, tokens, prompt_tokens, generated, reason, _ = output
    number = numbers.get(uid) if reason == GenerationFinishReason.NONE else numbers.pop(uid, None)
    if number is None:
        return None
    return [number, [int(token) for token in tokens], prompt_tokens, generated, reason.value]


def _add_service(original, service, server) -> None:
    import grpc

    original(service, server)
    pipeline = getattr(service, "inference_pipeline", None)
    if pipeline is not None:
        handler = grpc.stream_stream_rpc_method_handler(lambda requests, context: carry(pipeline, requests, context))
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {METHOD: handler}),))


def _wrap_service() -> None:
    from mii.grpc_related.proto import modelresponse_pb2_grpc

    wrap(modelresponse_pb2_grpc, "add_ModelResponseServicer_to_server", _add_service)


HOOKS = (Hook("mii.grpc_related, a rank's services", "streams took the interpreter from the steps", _wrap_service),)
