"""Requests that nobody waits for any more: they leave between two steps, and their cache blocks are free for the next."""

from __future__ import annotations

from collections import deque


def start(pipeline) -> None:
    """Before its first request."""
    #: The uids of requests that are to leave, in the order in which that was asked for.
    pipeline._cancelled = deque()


def cancel(pipeline, uid: int) -> None:
    """Lets a request leave, soon. To be called in any thread; nothing happens if it has finished."""
    pipeline._cancelled.append(uid)


def drop_cancelled(pipeline) -> None:
    """Between two steps, when whatever runs or waits is in ``buffer`` or ``request_queue``."""
    if not pipeline._cancelled:
        return
    cancelled = {pipeline._cancelled.popleft() for _ in range(len(pipeline._cancelled))}
    while not pipeline.request_queue.empty():
        pipeline.buffer.append(pipeline.request_queue.get_nowait())
    dropped = [r for r in pipeline.buffer if r.uid in cancelled and not r.is_flush_request]
    pipeline.buffer = deque(r for r in pipeline.buffer if r.uid not in cancelled or r.is_flush_request)
    for request in dropped:
        request.has_left = True
    for uid in {request.uid for request in dropped}:
        pipeline._forget(uid)


def forget(pipeline, uid: int) -> None:
    """Frees what a sequence holds that takes part in no further step."""
    if pipeline.inference_engine._state_manager.get_sequence(uid) is not None:
        pipeline._queue_flush_request(uid)
