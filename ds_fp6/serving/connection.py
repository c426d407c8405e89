"""Answers that stop being computed when nobody waits for them any more."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ds_fp6.serving.errors import ApiError

Result = TypeVar("Result")

#: Nobody receives it. It is nginx' code for a client that hung up.
CLIENT_GONE = 499


async def _hang_up(receive: Receive) -> None:
    """Returns when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def while_connected(receive: Receive, answer: Awaitable[Result]) -> Result:
    """Waits for ``answer``, which is cancelled if the client hangs up. Raises ``ApiError`` 499 then."""
    work, watch = asyncio.ensure_future(answer), asyncio.ensure_future(_hang_up(receive))
    try:
        await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ApiError(CLIENT_GONE, "the client hung up")
        return work.result()
    finally:
        for task in (work, watch):
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await work


class EventStream(Response):
    """Server-sent events: a ``data:`` line for each chunk, an error as the last one if there is one, ``[DONE]``.

    ``on_end`` is called once nothing more is sent, also if nothing was.
    """

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncGenerator[dict[str, Any], None], on_end: Callable[[], None]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._chunks, self._on_end = chunks, on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with contextlib.suppress(ApiError):
                await while_connected(receive, self._send(send))
        finally:
            self._on_end()

    async def _send(self, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            try:
                async for chunk in self._chunks:
                    await send(_event(json.dumps(chunk, ensure_ascii=False)))
            except Exception as error:
                known = isinstance(error, ApiError)
                failure = error if known else ApiError(500, f"{type(error).__name__}: {error}")
                await send(_event(json.dumps(failure.body, ensure_ascii=False)))
            await send(_event("[DONE]"))
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await self._chunks.aclose()


def _event(data: str) -> dict[str, Any]:
    return {"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True}
