"""The bridge between HTTP requests, which live in the event loop, and the pipeline's generation thread."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ds_fp6.serving.errors import ApiError

if TYPE_CHECKING:
    from ds_fp6.integrations.mii.sampling import Sampling
    from ds_fp6.integrations.mii.serving import ServedSequence, ServingPipeline, Step


class Mailbox:
    """Steps of the sequences of one request, in the order in which they were generated."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[tuple[int, Step | BaseException]] = asyncio.Queue()
        self.put = self._queue.put_nowait

    async def get(self) -> tuple[int, Step]:
        """(uid, step) of any of the sequences. Raises ``ApiError`` 500 if generation has failed."""
        uid, step = await self._queue.get()
        if isinstance(step, BaseException):
            raise ApiError(500, f"generation stopped because of {type(step).__name__}: {step}") from step
        return uid, step


class Engine:
    """Everything but ``fail`` is called in the event loop.

    Args:
        pipeline: of rank 0.
        on_failure: is called in the event loop once generation has failed.
    """

    def __init__(self, pipeline: ServingPipeline, on_failure: Callable[[], None] = lambda: None) -> None:
        self.pipeline = pipeline
        self._on_failure = on_failure
        self._mailboxes: dict[int, Mailbox] = {}
        self._thread = threading.Thread(target=pipeline, name="generation", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        pipeline.deliver = self._deliver

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        if self.failure is not None:
            self._on_failure()

    async def stop(self, patience: float = 10.0) -> None:
        """Ends the generation thread, or leaves it where it hangs after ``patience`` seconds."""
        self.pipeline.end()
        await asyncio.to_thread(self._thread.join, patience)

    def fail(self, failure: BaseException) -> None:
        """Gives up, from any thread: whoever waits for a step gets ``failure``."""
        self.pipeline.fail(failure)

    @property
    def failure(self) -> BaseException | None:
        return self.pipeline.failure

    def check(self) -> None:
        """Raises ``ApiError`` 503 once generation has failed."""
        if self.failure is not None:
            kind = type(self.failure).__name__
            raise ApiError(503, f"generation stopped because of {kind}: {self.failure}") from self.failure

    def submit(
        self, mailbox: Mailbox, tokens: Sequence[int], sampling: Sampling, max_new_tokens: int, **options
    ) -> ServedSequence:
        """Queues a prompt, see ``ServingPipeline.submit``; its steps go to ``mailbox``."""
        self.check()
        sequence = self.pipeline.submit(tokens, sampling, max_new_tokens, **options)
        # No step of it can have arrived: they come through this loop.
        self._mailboxes[sequence.uid] = mailbox
        return sequence

    def cancel(self, uid: int) -> None:
        """Forgets a sequence, whether it waits, runs or has finished."""
        if self._mailboxes.pop(uid, None) is not None:
            self.pipeline.cancel(uid)

    def _deliver(self, outputs: list[tuple[int, Step | BaseException]]) -> None:
        if self._loop is None:
            return
        # The loop is closed if the server has ended meanwhile.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._dispatch, outputs)

    def _dispatch(self, outputs: list[tuple[int, Step | BaseException]]) -> None:
        for uid, step in outputs:
            mailbox = self._mailboxes.get(uid)
            if mailbox is None:
                continue
            if isinstance(step, BaseException) or step.finish is not None:
                del self._mailboxes[uid]
            mailbox.put((uid, step))
        if self.failure is not None:
            self._on_failure()
