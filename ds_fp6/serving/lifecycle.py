"""A server's life: its port, its ranks, its model, its requests, and its end."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import uvicorn

from ds_fp6.serving import ranks
from ds_fp6.serving.settings import Settings

if TYPE_CHECKING:
    from ds_fp6.integrations.mii.serving import ServingPipeline

#: DeepSpeed's defaults: sequences and tokens in a batch, sequences with KV blocks.
MOST_SEQUENCES, MOST_TOKENS, MOST_TRACKED = 512, 768, 2048

#: Seconds for which clients may take their errors after a failure.
FAREWELL_SECONDS = 5


def serve(settings: Settings, command: Sequence[str]) -> int:
    """Serves until SIGTERM or SIGINT, then finishes what runs, for ``settings.drain_seconds`` at most.

    ``command`` starts this program again, for the other ranks of a tensor-parallel model. Returns the exit status:
    0 after a signal, 1 after a failure of the model. Raises ``OSError`` for a port that is taken, ``ValueError``
    for settings that the model or this machine refuses.
    """
    _choose_device(settings.device)
    if ranks.launched() and ranks.rank() > 0:
        ranks.stay_with_rank_0(settings.drain_seconds + ranks.PATIENCE)
        open_pipeline(settings).follow()
        return 0
    listener = _listen(settings.host, settings.port)
    run = _Run(settings, listener)
    if settings.tensor_parallel > 1 and not ranks.launched():
        run.ranks = ranks.Ranks(command, settings.tensor_parallel, run.rank_died)
    return run.until_the_end()


def _choose_device(device: str) -> None:
    """DeepSpeed takes its accelerator from the environment."""
    if device == "auto":
        return
    os.environ["DS_ACCELERATOR"] = device
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise ValueError("--device cuda: torch finds no CUDA device")


def _listen(host: str, port: int) -> socket.socket:
    """A socket that is bound before the model is loaded, so that a port in use is known at once."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise OSError(error.errno, f"cannot listen on {host}:{port}: {os.strerror(error.errno)}") from None
    return listener


def batch_limits(settings: Settings) -> dict[str, Any]:
    """Fields of DeepSpeed's ``DSStateManagerConfig``, which wants more tokens in a batch than sequences.

    Raises ``ValueError`` if the settings do not.
    """
    sequences, tokens = settings.max_num_seqs, settings.max_num_batched_tokens
    if sequences is None:
        sequences = min(MOST_SEQUENCES, MOST_TOKENS if tokens is None else tokens - 1)
    if tokens is None:
        tokens = max(MOST_TOKENS, sequences + 1)
    if not 0 < sequences < tokens:
        raise ValueError(
            f"--max-num-batched-tokens must be more than --max-num-seqs, and at least 2: got {tokens} and {sequences}"
        )
    limits = {
        "max_ragged_sequence_count": sequences,
        "max_ragged_batch_size": tokens,
        "max_tracked_sequences": max(MOST_TRACKED, sequences),
    }
    if settings.num_kv_blocks is not None:
        limits["memory_config"] = {"mode": "allocate", "size": settings.num_kv_blocks}
    return limits


def open_pipeline(settings: Settings) -> ServingPipeline:
    """Loads this rank's part of the model."""
    from ds_fp6.integrations.mii.serving import open_serving_pipeline

    return open_serving_pipeline(
        settings.model,
        settings.quantization_mode,
        load_format=settings.load_format,
        tokenizer=settings.tokenizer,
        tensor_parallel=settings.tensor_parallel,
        max_length=settings.max_model_len,
        state_manager=batch_limits(settings),
    )


class _Server(uvicorn.Server):
    """uvicorn's, which says when it listens."""

    def __init__(self, config: uvicorn.Config, on_listening: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_listening = on_listening

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if self.started:
            self._on_listening()


class _Run:
    """Rank 0 from its start to its end."""

    def __init__(self, settings: Settings, listener: socket.socket) -> None:
        self._settings, self._listener = settings, listener
        self._engine = None
        self._server = None
        self.ranks: ranks.Ranks | None = None

    def rank_died(self, failure: RuntimeError) -> None:
        """In another thread. While the model loads nobody can be told but the terminal."""
        print(f"ds-fp6: {failure}", file=sys.stderr, flush=True)
        if self._engine is None:
            os._exit(1)
        self._engine.fail(failure)

    def until_the_end(self) -> int:
        try:
            return self._serve()
        finally:
            if self.ranks is not None:
                self.ranks.stop(0 if self._failed else ranks.PATIENCE)

    @property
    def _failed(self) -> bool:
        return self._engine is None or self._engine.failure is not None

    def _serve(self) -> int:
        from ds_fp6.serving.app import create_app
        from ds_fp6.serving.engine import Engine

        pipeline = open_pipeline(self._settings)
        engine = Engine(pipeline, self._end_after_failure)
        app = create_app(self._settings, engine, self._drained)
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, lifespan="on", ws="none",
            timeout_graceful_shutdown=self._settings.drain_seconds,
        )  # fmt: skip
        self._server = _Server(config, lambda: self._announce(pipeline))
        self._engine = engine
        # uvicorn handles them while it serves, and raises them again at its end: then there is nothing left to end.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._end)
        self._server.run(sockets=[self._listener])
        if engine.failure is None:
            return 0
        print(f"ds-fp6: generation stopped because of {engine.failure}", file=sys.stderr, flush=True)
        if self.ranks is not None:
            self.ranks.stop(0)
        # The generation thread may hang in a collective operation for ever.
        os._exit(1)

    def _drained(self) -> None:
        if self.ranks is not None:
            self.ranks.expect_end()

    def _end(self, *_arguments: object) -> None:
        self._server.should_exit = True

    def _end_after_failure(self) -> None:
        self._server.config.timeout_graceful_shutdown = FAREWELL_SECONDS
        self._server.should_exit = True

    def _announce(self, pipeline: ServingPipeline) -> None:
        host, port = self._listener.getsockname()[:2]
        host = f"[{host}]" if ":" in host else host
        names = ", ".join(self._settings.served_model_names)
        print(
            f"ds-fp6: serving {names} on http://{host}:{port}/v1, {pipeline.blocks} KV blocks of "
            f"{pipeline.block_size} tokens, {pipeline.max_length} tokens a sequence",
            flush=True,
        )
