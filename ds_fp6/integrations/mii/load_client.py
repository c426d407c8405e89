"""Starting a server for a benchmark, and streaming from it at little cost: one thread, one connection, no text."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

from ds_fp6.integrations.mii import guard, server
from ds_fp6.integrations.mii.errors import readable
from ds_fp6.integrations.mii.load_format import has_tokenizer
from ds_fp6.integrations.mii.ports import free_ports


@contextlib.contextmanager
def served(
    model: str | Path,
    mode: str | None,
    tensor_parallel: int = 1,
    load_format: str = "auto",
    state_manager: dict[str, Any] | None = None,
    log: str | Path | None = None,
    start_limit: float = 600.0,
    environment: dict[str, str] | None = None,
) -> Iterator[int]:
    """``mii.serve`` on free ports; the port of its load balancer. All of its processes are gone afterwards,
    and soon after this process, however it ends.

    Args:
        mode: quantization mode, None for the checkpoint's own weights.
        state_manager: fields of DeepSpeed's ``DSStateManagerConfig``.
        log: a file that takes what the server's processes print.
        start_limit: seconds within which it must have started.
        environment: variables that its processes get besides this one's.

    Raises ``ServerFailed`` with the reason where it does not start.
    """
    import mii
    from mii.logging import logger

    from ds_fp6.integrations import mii as hooks

    hooks.install()
    logger.setLevel(logging.WARNING)
    name = f"ds-fp6-load-{os.getpid()}"
    ports = {"port_number": free_ports(2 + tensor_parallel), "torch_dist_port": free_ports(1)}
    with tempfile.TemporaryDirectory() as scores, _environment(MII_CACHE_PATH=scores):
        variables = {server.LOG: log and str(log), server.START_LIMIT: str(start_limit)}
        variables[guard.OWNER_VARIABLE] = str(os.getpid())
        try:
            with _environment(**variables, **(environment or {})):
                mii.serve(
                    str(model), deployment_name=name, quantization_mode=mode, tensor_parallel=tensor_parallel,
                    load_format=load_format, inference_engine_config={"state_manager": state_manager or {}},
                    zmq_port_number=free_ports(1), **ports,
                )  # fmt: skip
            yield ports["port_number"]
        finally:
            server.end(name)


@contextlib.contextmanager
def _environment(**variables: str | None) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update({name: value for name, value in variables.items() if value is not None})
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)


class LoadClient:
    """Streams greedy answers of exactly the wanted lengths. To be used within one running event loop."""

    def __init__(self, port: int) -> None:
        from mii.backend.client import create_channel
        from mii.grpc_related.proto.modelresponse_pb2_grpc import ModelResponseStub

        self._channel = create_channel("localhost", port)
        self._stub = ModelResponseStub(self._channel)

    async def stream(self, prompt: str, new_tokens: int) -> AsyncIterator[tuple[int, int]]:
        """(tokens generated so far, tokens of the prompt) as each message comes.

        The end of text is ignored. Raises ``RuntimeError`` with the server's words.
        """
        import grpc
        from mii.constants import TaskType
        from mii.grpc_related.task_methods import TASK_METHODS_DICT

        request = TASK_METHODS_DICT[TaskType.TEXT_GENERATION].pack_request_to_proto(
            [prompt], max_new_tokens=new_tokens, ignore_eos=True, do_sample=False, stream=True
        )
        call = self._stub.GeneratorReplyStream(request)
        try:
            async for message in call:
                reply = message.response[0]
                yield reply.generated_tokens, reply.prompt_tokens
        except grpc.RpcError as error:
            raise readable(error, None) from error
        finally:
            call.cancel()

    async def close(self) -> None:
        await self._channel.close()


def prompts(model: str | Path, lengths: Sequence[int], vocabulary: int, seed: int) -> list[str]:
    """Random prompts of about ``lengths`` tokens: exactly so for a model without a tokenizer, whose text is token ids.

    Text that a tokenizer makes of random tokens need not come back as the same ones; the server counts what it got.
    """
    draw = random.Random(seed)
    if not has_tokenizer(model):
        return [" ".join(str(draw.randrange(vocabulary)) for _ in range(length)) for length in lengths]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(model))
    special = set(tokenizer.all_special_ids)
    ordinary = [token for token in range(len(tokenizer)) if token not in special]

    def text(length: int) -> str:
        tokens = [draw.choice(ordinary) for _ in range(length)]
        for _ in range(3):
            words = tokenizer.decode(tokens[:length])
            tokens = [token for token in tokenizer.encode(words) if token not in special]
            if len(tokens) < length:
                tokens += [draw.choice(ordinary) for _ in range(length - len(tokens))]
        return words

    return [text(length) for length in lengths]
