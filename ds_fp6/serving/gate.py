"""What a request must pass before an endpoint sees it: its key, its size, and the number of those in flight."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ds_fp6.serving.errors import ApiError
from ds_fp6.serving.metrics import Metrics

#: Paths that are counted apart.
COUNTED = frozenset({"/health", "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions"})
#: Paths below it need a key.
GUARDED = "/v1/"


class Keys:
    """The keys that open the API; with none of them it is open."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def check(self, scope: Scope) -> None:
        """Raises ``ApiError`` 401 unless the request carries one of the keys.

        Every key is compared, in a time that depends neither on which one it is nor on how much of it is right.
        """
        if not self._digests:
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, key = given.partition(b" ")
        digest = hashlib.sha256(key.strip()).digest()
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        if scheme.lower() != b"bearer" or not any(matches):
            message = "the API key is missing or wrong: send the header Authorization: Bearer KEY"
            raise ApiError(401, message, code="invalid_api_key")


async def read_body(scope: Scope, receive: Receive, limit: int) -> bytes:
    """A request's body. Raises ``ApiError`` 413 as soon as it is known to be longer than ``limit`` bytes."""
    message = f"the request is longer than {limit} bytes (--max-request-bytes)"
    too_long = ApiError(413, message, code="request_too_large")
    length = dict(scope["headers"]).get(b"content-length", b"0")
    if length.isdigit() and int(length) > limit:
        raise too_long
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ApiError(400, "the client hung up before the end of its request")
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > limit:
            raise too_long
    return body


class Gate:
    """ASGI middleware. Answers 401, 413 and 429 itself, and counts every request by path and status."""

    def __init__(
        self, app: ASGIApp, keys: Keys, metrics: Metrics, max_request_bytes: int, max_concurrent_requests: int
    ) -> None:
        self._app, self._keys, self._metrics = app, keys, metrics
        self._max_bytes, self._max_concurrent = max_request_bytes, max_concurrent_requests
        self._running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # An answer that nobody could be sent counts as 499.
        status = 499

        async def noting_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._pass(scope, receive, noting_send)
        except ApiError as error:
            await error.response(scope, receive, noting_send)
        finally:
            path = scope["path"] if scope["path"] in COUNTED else "other"
            self._metrics.requests.labels(path, str(status)).inc()

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not scope["path"].startswith(GUARDED):
            await self._app(scope, receive, send)
            return
        self._keys.check(scope)
        if scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        body = await read_body(scope, receive, self._max_bytes)
        if self._running >= self._max_concurrent:
            raise ApiError(
                429,
                f"{self._running} requests are in flight, as many as this server takes (--max-concurrent-requests)",
                code="rate_limit_exceeded",
            )
        self._running += 1
        self._metrics.requests_running.set(self._running)
        try:
            await self._app(scope, _replay(body, receive), send)
        finally:
            self._running -= 1
            self._metrics.requests_running.set(self._running)


def _replay(body: bytes, receive: Receive) -> Receive:
    """A ``receive`` that gives the body again before what comes after it."""
    given = False

    async def replaying() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replaying
