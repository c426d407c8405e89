"""MII's pipelines: their construction without a GPU, and what they do when something fails."""

from __future__ import annotations

import contextlib
import functools
import queue
import socket
import threading
import weakref

import torch

from ds_fp6.integrations.deepspeed.accelerator import local_rank, on_cpu
from ds_fp6.integrations.deepspeed.graphs import reserved_blocks
from ds_fp6.integrations.patching import Hook, wrap


def kv_capacity(engine) -> int:
    """Tokens that the KV cache of an ``InferenceEngineV2`` holds for its sequences."""
    kv_cache = engine._state_manager._kv_cache
    _, blocks, block_size, *_ = kv_cache._caches[0].shape
    return (blocks - reserved_blocks(kv_cache)) * block_size


def kv_block_size(engine) -> int:
    """Tokens that a block of the KV cache of an ``InferenceEngineV2`` holds."""
    return engine._state_manager._kv_cache._caches[0].shape[2]


def _port_is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        return probe.connect_ex(("localhost", port)) != 0


def _zmq_port(preferred: int, ranks: int) -> int:
    """A port that rank 0 can publish requests on: 0, any, without other ranks, else one that all ranks know."""
    if ranks == 1:
        return 0
    chosen = [preferred]
    if local_rank() == 0 and not _port_is_free(preferred):
        with socket.socket() as probe:
            probe.bind(("", 0))
            chosen = [probe.getsockname()[1]]
    torch.distributed.broadcast_object_list(chosen, src=0)
    return chosen[0]


@contextlib.contextmanager
def _no_cuda_synchronize():
    """MII calls ``torch.cuda.synchronize()`` once, whatever the accelerator."""
    if not on_cpu():
        yield
        return
    synchronize, torch.cuda.synchronize = torch.cuda.synchronize, lambda *args, **kwargs: None
    try:
        yield
    finally:
        torch.cuda.synchronize = synchronize


def _init(original, self, inference_engine, tokenizer, model_config) -> None:
    from mii.logging import logger

    longest = inference_engine.model().max_sequence_length
    if model_config.max_length is not None and model_config.max_length > longest:
        raise ValueError(f"max_length {model_config.max_length} is more than the model's {longest}")
    own = model_config.model_copy(
        update={
            "zmq_port_number": _zmq_port(model_config.zmq_port_number, model_config.tensor_parallel),
            "max_length": model_config.max_length or longest,
        }
    )
    with _no_cuda_synchronize():
        original(self, inference_engine, tokenizer, own)
    self.model_config = model_config
    # Left to the garbage collector, the context may go before its socket, and waits for it for ever.
    weakref.finalize(self, _close, self.socket, self._zmq_context)
    capacity = kv_capacity(inference_engine)
    if capacity < self.max_length:
        logger.warning(f"ds_fp6: the KV cache holds {capacity} tokens: sequences end there, not at {self.max_length}")
        self.max_length = capacity


def _close(zmq_socket, context) -> None:
    zmq_socket.close(linger=0)
    context.term()


def _call(original, self, *args, **kwargs):
    try:
        return original(self, *args, **kwargs)
    except BaseException:
        _forget_requests(self)
        raise


def _forget_requests(pipeline) -> None:
    """Drops everything that is waiting, scheduled or in the KV cache."""
    from mii.batching.data_classes import RequestBatch

    with contextlib.suppress(queue.Empty):
        while True:
            pipeline.request_queue.get_nowait()
    pipeline.result_queues.clear()
    pipeline.buffer.clear()
    pipeline._flight = None
    pipeline._reset_scheduler_bookkeeping()
    pipeline.scheduled_requests = RequestBatch()
    engine = getattr(pipeline, "inference_engine", None)
    if engine is not None:
        for uid in list(engine._state_manager.tracked_sequences):
            engine.flush(uid)


def _generation_thread(original, self) -> None:
    """``MIIAsyncPipeline.__call__``, whose failure reaches those who wait for a response."""
    try:
        original(self)
    except BaseException as error:
        from mii.logging import logger

        logger.exception("ds_fp6: generation stopped")
        with self.lock:
            self._failure = error
            for results in self.result_queues.values():
                results.put(error)


def check_running(pipeline) -> None:
    """Raises ``RuntimeError`` if the generation thread of an ``MIIAsyncPipeline`` has failed."""
    failure = getattr(pipeline, "_failure", None)
    if failure is not None:
        raise RuntimeError(f"generation stopped because of {type(failure).__name__}: {failure}") from failure


def _put_request(original, self, prompt, kwargs):
    check_running(self)
    uid = original(self, prompt, kwargs)
    if getattr(self, "_failure", None) is not None:
        # It failed since, and may not have seen this thread's queue.
        self.result_queues[threading.get_ident()].put(self._failure)
    return uid


def _wrap_pipelines() -> None:
    from mii.batching.ragged_batching import MIIAsyncPipeline, MIIPipeline, RaggedBatchBase

    rank = functools.cached_property(lambda self: local_rank())
    rank.__set_name__(RaggedBatchBase, "local_rank")
    RaggedBatchBase.local_rank = rank
    wrap(RaggedBatchBase, "__init__", _init)
    wrap(MIIPipeline, "__call__", _call)
    wrap(MIIAsyncPipeline, "__call__", _generation_thread)
    wrap(MIIAsyncPipeline, "put_request", _put_request)


HOOKS = (
    Hook("mii.batching.ragged_batching.*Pipeline", "CPU: CUDA calls, device as rank; ports, failures", _wrap_pipelines),
)
