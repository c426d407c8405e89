"""The load balancer of ``mii.serve``: an event loop between its clients and the replicas, which it takes in turns.

It makes the text of streams, whose tokens come over one call a replica (``streams.py``). Tokens that come while a stream's
message before is under way go out together: a client that is slow, or too many of them, hold nobody up.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from ds_fp6.integrations.mii import errors, streams
from ds_fp6.integrations.mii.server import check_port
from ds_fp6.integrations.mii.stream import TextStream
from ds_fp6.integrations.patching import Hook, wrap

_SERVICE = "modelresponse.ModelResponse"


class Stream:
    """What has come for a client and is not on its way yet."""

    def __init__(self) -> None:
        self._changed = asyncio.Event()
        self._tokens: list[int] = []
        self._counts = (0, 0)
        self._error: Exception | None = None
        self._reason: str | None = None  # as MII names it, once the stream has ended

    def add(self, tokens: list[int], prompt_tokens: int, generated: int, reason: str, ended: bool) -> None:
        self._tokens += tokens
        self._counts = prompt_tokens, generated
        if ended:
            self._reason = reason
        self._changed.set()

    def fail(self, error: Exception) -> None:
        self._error = error
        self._changed.set()

    @property
    def has_ended(self) -> bool:
        return self._reason is not None or self._error is not None

    async def replies(self, decode: Callable[[list[int]], str]) -> AsyncIterator[bytes]:
        """Serialized ``MultiGenerationReply``s, each with all that came since the one before."""
        from mii.constants import GenerationFinishReason
        from mii.grpc_related.proto.modelresponse_pb2 import MultiGenerationReply, SingleGenerationReply

        text, going_on = TextStream(decode), str(GenerationFinishReason.NONE.value)
        while self._reason is None or self._changed.is_set():
            await self._changed.wait()
            self._changed.clear()
            if self._error is not None:
                raise self._error
            tokens, self._tokens = self._tokens, []
            pieces = [text.add(token) for token in tokens]
            if self._reason is not None:
                pieces.append(text.finish())
            reply = SingleGenerationReply(
                response="".join(pieces), finish_reason=self._reason or going_on, prompt_tokens=self._counts[0],
                generated_tokens=self._counts[1], time_taken=-1, model_time_taken=-1,
            )  # fmt: skip
            yield MultiGenerationReply(response=[reply]).SerializeToString()


class Replica:
    """A replica's ranks, of which the first generates."""

    def __init__(self, hostname: str, ports: list[int]) -> None:
        from mii.backend.client import create_channel

        self._channels = [create_channel(hostname, port) for port in ports]
        self._streams: dict[int, Stream] = {}
        self._numbers = itertools.count()
        #: The call that carries the streams, None where there is none that could; and who reads it.
        self._call: Any = None
        self._reader: asyncio.Task | None = None
        self._sending = asyncio.Lock()

    async def reply(self, request: bytes) -> bytes:
        """``GeneratorReply``."""
        return await self._channels[0].unary_unary(f"/{_SERVICE}/GeneratorReply")(request)

    @contextlib.asynccontextmanager
    async def stream(self, request: bytes) -> AsyncIterator[Stream]:
        """A stream that the rank has been asked for, and that it need not go on with afterwards."""
        number = next(self._numbers)
        stream = self._streams[number] = Stream()
        try:
            await self._send(streams.message(number, request))
            yield stream
        finally:
            # Gone already if its call has failed.
            if self._streams.pop(number, None) and not stream.has_ended and self._call is not None:
                await asyncio.shield(self._send(streams.message(number)))

    async def end(self) -> None:
        """Ends the ranks' servers. A rank that is gone needs no end."""
        if self._call is not None:
            self._reader.cancel()
            self._call.cancel()
        ends = [channel.unary_unary(f"/{_SERVICE}/Terminate")(b"") for channel in self._channels]
        await asyncio.gather(*ends, return_exceptions=True)

    async def _send(self, message: bytes) -> None:
        import grpc

        async with self._sending:
            if self._call is None:
                self._call = self._channels[0].stream_stream(f"/{streams.SERVICE}/{streams.METHOD}")()
                self._reader = asyncio.create_task(self._read(self._call))
            # What the call has failed with comes to its reader.
            with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):
                await self._call.write(message)

    async def _read(self, call: Any) -> None:
        """Hands out what comes, until the call fails: then all of its streams do."""
        from mii.constants import GenerationFinishReason

        going_on = GenerationFinishReason.NONE.value
        try:
            async for message in call:
                for number, *output in json.loads(message):
                    stream = self._streams.get(number)
                    if stream is None:
                        continue
                    if len(output) == 1:
                        stream.fail(RuntimeError(output[0]))
                    else:
                        stream.add(*output[:3], str(output[3]), output[3] != going_on)
            failure: Exception = RuntimeError("the replica ended its streams")
        except Exception as error:
            failure = error
        # Streams that come from now on have a call of their own: to find out why this one failed may take a while.
        self._call, (failed, self._streams) = None, (self._streams, {})
        failure = await asyncio.to_thread(errors.readable, failure, errors.own_directory())
        for stream in failed.values():
            stream.fail(failure)


class Balancer:
    """MII's service for clients. Errors that come to them have MII's status, and say what happened."""

    def __init__(self, model_config: Any) -> None:
        from mii.modeling.tokenizers import load_tokenizer

        self._replicas = [Replica(each.hostname, each.tensor_parallel_ports) for each in model_config.replica_configs]
        self._turns = itertools.cycle(self._replicas)
        self._tokenizer = asyncio.create_task(asyncio.to_thread(load_tokenizer, model_config))
        self.ended = asyncio.Event()

    def handlers(self) -> Any:
        import grpc

        return grpc.method_handlers_generic_handler(_SERVICE, {
            "GeneratorReply": grpc.unary_unary_rpc_method_handler(self._reply),
            "GeneratorReplyStream": grpc.unary_stream_rpc_method_handler(self._stream),
            "Terminate": grpc.unary_unary_rpc_method_handler(self._end),
        })  # fmt: skip

    async def _reply(self, request: bytes, context: Any) -> bytes:
        try:
            return await next(self._turns).reply(request)
        except Exception as error:
            await _abort(context, error)

    async def _stream(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        try:
            decode = (await asyncio.shield(self._tokenizer)).decode
            async with next(self._turns).stream(request) as stream:
                async for reply in stream.replies(decode):
                    yield reply
        except Exception as error:
            await _abort(context, error)

    async def _end(self, request: bytes, context: Any) -> bytes:
        await asyncio.gather(*(replica.end() for replica in self._replicas))
        self.ended.set()
        return b""


async def _abort(context: Any, error: Exception) -> None:
    import grpc

    error = await asyncio.to_thread(errors.readable, error, errors.own_directory())
    await context.abort(grpc.StatusCode.UNKNOWN, str(error))


async def _serve(model_config: Any, port: int) -> None:
    import grpc
    from mii.constants import GRPC_MAX_MSG_SIZE, SERVER_SHUTDOWN_TIMEOUT

    check_port(port)
    limits = ("grpc.max_send_message_length", "grpc.max_receive_message_length")
    server = grpc.aio.server(options=[(limit, GRPC_MAX_MSG_SIZE) for limit in limits])
    balancer = Balancer(model_config)
    server.add_generic_rpc_handlers((balancer.handlers(),))
    server.add_insecure_port(f"[::]:{port}")
    await server.start()
    await balancer.ended.wait()
    await server.stop(SERVER_SHUTDOWN_TIMEOUT)


def _wrap_load_balancer() -> None:
    from mii.grpc_related import modelresponse_server

    wrap(modelresponse_server, "serve_load_balancing", lambda _mii, config, port: asyncio.run(_serve(config, port)))


HOOKS = (Hook("mii.grpc_related, its load balancer", "three threads a stream, and failed ones hung", _wrap_load_balancer),)
