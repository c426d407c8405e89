"""Failures on their way from a rank over the load balancer to the client, which waits for nobody who is gone."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from ds_fp6.integrations.mii import guard
from ds_fp6.integrations.mii.server import ServerFailed, deployment_directory
from ds_fp6.integrations.patching import Hook, wrap

#: Seconds in which a guard notices a failure and says what it was.
NOTICE = 8
#: What gRPC says of connections that broke, besides its status for that.
BROKEN = ("Stream removed", "Internal error from Core")


def readable(error: Exception, directory: Path | None) -> Exception:
    """What to raise for an error of gRPC: its text, or why the server is gone. Other errors stay as they are."""
    import grpc

    if not isinstance(error, grpc.RpcError):
        return error
    text = error.details() or str(error.code())
    if error.code() == grpc.StatusCode.UNAVAILABLE or text.startswith(BROKEN):
        reason = guard.failure(directory, NOTICE) if directory is not None and directory.is_dir() else None
        return ServerFailed(f"the server is gone: {reason or text}")
    for noise in ("Exception iterating responses: ", "Exception calling application: "):
        text = text.removeprefix(noise)
    return ServerFailed(text) if text.startswith("the server is gone") else RuntimeError(text)


def own_directory() -> Path | None:
    return Path(os.environ[guard.VARIABLE]) if guard.VARIABLE in os.environ else None


async def _request(original, self, prompts, **options):
    import grpc

    try:
        return await original(self, prompts, **options)
    except grpc.RpcError as error:
        raise readable(error, deployment_directory(self.mii_config.deployment_name)) from error


async def _stream(original, self, prompts, **options):
    import grpc

    try:
        async for response in original(self, prompts, **options):
            yield response
    except grpc.RpcError as error:
        raise readable(error, deployment_directory(self.mii_config.deployment_name)) from error


def _client_init(original, self, *args, **kwargs) -> None:
    """MII takes the thread's event loop, which only the main thread has, and only before its first asyncio.run."""
    policy = asyncio.get_event_loop_policy()
    try:
        loop = policy.get_event_loop()
    except RuntimeError:
        loop = None
    if loop is None or loop.is_closed():
        policy.set_event_loop(policy.new_event_loop())
    original(self, *args, **kwargs)


def _wrap_client() -> None:
    from mii.backend.client import MIIClient

    wrap(MIIClient, "__init__", _client_init)
    wrap(MIIClient, "_request_async_response", _request)
    wrap(MIIClient, "_request_async_response_stream", _stream)


HOOKS = (
    Hook("mii.backend.client.MIIClient", "errors say what happened, not what gRPC makes of it", _wrap_client),
)
