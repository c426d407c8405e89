"""MII's hooks: its pipelines without a GPU, and the defects of its scheduler and server that users would meet.

``install`` is called after ``import mii``, which has hooked DeepSpeed before.
"""

from __future__ import annotations

import threading

from ds_fp6.integrations import deepspeed, versions
from ds_fp6.integrations.patching import Hook, Repair

_lock = threading.Lock()
_installed = False

#: What the hooks of this package repair, as ``ds-fp6 env`` lists it.
REPAIRS = (
    Repair("request-checks", "empty prompts and requests beyond the model's or the KV cache's length hung or asserted"),
    Repair("full-cache", "a full KV cache started a split prompt over for ever, or failed while others finished"),
    Repair("standstill", "with more requests than the KV cache had room for, all but two or three of them stood still"),
    Repair("requeue", "text generated before a request lost its KV cache was missing from its response"),
    Repair("failed-call", "a call that raised left requests behind that corrupted the next one"),
    Repair("async-failure", "an exception in the generation thread left every client waiting for ever"),
    Repair("ports", "a second live pipeline found ports 25555 and 29500 taken"),
    Repair("server", "failed streams left their client waiting, failed servers their processes running"),
    Repair("score-file", "a server started again within a second got the arguments of the one before"),
    Repair("server-ports", "a server on a port that is in use started all the same, and shared its requests"),
    Repair("restful-gateway", "terminate_server left the RESTful gateway running"),
    Repair("idle", "a server without requests kept a core busy"),
    Repair("client-loop", "mii.client failed outside the main thread, and after asyncio.run"),
    Repair("rank-count", "a launcher that started more or fewer ranks than tensor_parallel left them waiting"),
    Repair("launcher", "mii.serve failed without deepspeed on the PATH, and with more ranks than NUMA nodes (CPU)"),
    Repair("server-hooks", "mii.serve started processes without hooks where this package is not installed"),
    Repair("visible-devices", "mii.serve under CUDA_VISIBLE_DEVICES started on the first GPUs of the machine"),
    Repair("greedy", "requests that take the likeliest token sorted the vocabulary at each step, for top-p"),
    Repair("mixed-parameters", "requests with different sampling or stop parameters in one batch ended the server"),
    Repair("stream", "a stream went mute after bytes that are not valid UTF-8"),
    Repair("hang-up", "a server generated to the end for clients of streams that had hung up"),
    Repair("stream-threads", "a thread and a message for each stream and token took the interpreter from the steps"),
)


def hooks() -> tuple[Hook, ...]:
    """Every place of MII that is hooked, in the order of installation."""
    from ds_fp6.integrations.mii import api, balancer, errors, load_format, loop, pipeline, processing, requests
    from ds_fp6.integrations.mii import scheduling, score_file, server, stream, streams

    modules = load_format, api, pipeline, requests, scheduling, processing, loop, stream, score_file, server, errors
    modules += streams, balancer
    return tuple(hook for module in modules for hook in module.HOOKS)


def install() -> None:
    """Hooks MII, and DeepSpeed if need be. Idempotent. Raises ``UnsupportedVersion`` for other versions."""
    global _installed
    import mii  # noqa: F401  (its own post-import hook may come here first, so before the lock is taken)

    with _lock:
        if _installed:
            return
        deepspeed.install()
        versions.check("deepspeed-mii")
        for hook in hooks():
            hook.apply()
        _installed = True
