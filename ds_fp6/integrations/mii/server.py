"""MII's server: errors of streams reach their client, and a server that fails to start leaves no process behind."""

from __future__ import annotations

import os
import queue
import subprocess
import sys
from types import SimpleNamespace

from ds_fp6.integrations.deepspeed.accelerator import on_cpu
from ds_fp6.integrations.patching import Hook, wrap

#: Seconds that a server's process has to end by itself once it is told to.
PATIENCE = 10


class ResultQueue(queue.Queue):
    """A queue whose ``get`` raises what was put if that is an exception."""

    def get(self, *args, **kwargs):
        item = super().get(*args, **kwargs)
        if isinstance(item, BaseException):
            raise item
        return item


def _invoke_stream(original, self, method_name, proto_request, result_queue):
    """MII runs this in a thread whose exceptions nobody sees: its client waited ten minutes for a response."""
    try:
        return original(self, method_name, proto_request, result_queue)
    except Exception as error:
        result_queue.put(error)


def _wrap_streams() -> None:
    from mii.grpc_related import modelresponse_server

    modelresponse_server.queue = SimpleNamespace(Queue=ResultQueue, Empty=queue.Empty)
    wrap(modelresponse_server.ParallelStubInvoker, "invoke_stream", _invoke_stream)


def stop(processes: list[subprocess.Popen]) -> None:
    """Ends processes, at first politely: DeepSpeed's launcher then ends those that it started."""
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_live(original, self, processes, deployment):
    try:
        return original(self, processes, deployment)
    except BaseException:
        stop(processes)
        raise


def _launcher(original, self, *args, **kwargs) -> str:
    """This interpreter's own ``deepspeed``, which need not be on the PATH."""
    name, _, arguments = original(self, *args, **kwargs).partition(" ")
    own = f"{sys.executable} -m deepspeed.launcher.runner"
    return f"{own if name == 'deepspeed' else name} {arguments}"


def _init(original, self, mii_config) -> None:
    """On a CPU, DeepSpeed counts a device for each NUMA node, and refuses to run more ranks than that."""
    model = mii_config.model_conf
    if not on_cpu() or "LOCAL_SIZE" in os.environ:
        return original(self, mii_config)
    os.environ["LOCAL_SIZE"] = str(model.tensor_parallel * model.replica_num)
    try:
        return original(self, mii_config)
    finally:
        del os.environ["LOCAL_SIZE"]


def _wrap_start() -> None:
    from mii.backend.server import MIIServer

    wrap(MIIServer, "__init__", _init)
    wrap(MIIServer, "_generate_ds_launch_str", _launcher)
    wrap(MIIServer, "_wait_until_server_is_live", _wait_until_live)


HOOKS = (
    Hook("mii.grpc_related.modelresponse_server", "streams that failed left their client waiting", _wrap_streams),
    Hook("mii.backend.server.MIIServer", "its launcher, its ranks, its end", _wrap_start),
)
