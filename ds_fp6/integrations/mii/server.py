"""``mii.serve``: what can be refused is, and a server that fails to start or dies says why and leaves nothing behind.

A guard (``guard.py``) starts the processes of a deployment, and ends them all when one fails.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

from ds_fp6.integrations.deepspeed import refusals
from ds_fp6.integrations.deepspeed.accelerator import on_cpu
from ds_fp6.integrations.mii import entry, guard
from ds_fp6.integrations.mii.handover import is_idle
from ds_fp6.integrations.mii.pipeline import check_running
from ds_fp6.integrations.mii.ports import answers, is_free
from ds_fp6.integrations.patching import Hook, wrap

#: Seconds that a guard, told to end, has for ending its processes.
PATIENCE = 3 * guard.INSISTENCE
#: Variables: a file that takes what a server's processes print, and the seconds within which it must have started.
LOG = "DS_FP6_SERVER_LOG"
START_LIMIT = "DS_FP6_SERVER_START_LIMIT"
#: Seconds after which an idle rank looks whether it is to end.
IDLE = 0.1
#: Seconds that a rank whose generation failed has for answering its clients.
LAST_WORDS = 0.5


#: The guards of the deployments that this process started, by name.
_guards: dict[str, subprocess.Popen] = {}


class ServerFailed(RuntimeError):
    """A server that did not start, or that ended while it was needed."""


def deployment_directory(deployment_name: str) -> Path:
    """Where the processes of a deployment leave word of failures; a client finds it by the deployment's name."""
    from mii.constants import DeploymentType
    from mii.score.generate import generated_score_path

    return Path(generated_score_path(deployment_name, DeploymentType.LOCAL)).parent / "server"


def _ports(mii_config) -> list[tuple[str, int]]:
    """The ports that a server listens on at this machine, with the fields of the configuration that set them."""
    ports = [("port_number", mii_config.port_number)]
    if mii_config.enable_restful_api:
        ports.append(("restful_api_port", mii_config.restful_api_port))
    here = ("localhost", "127.0.0.1", socket.gethostname())
    for i, replica in enumerate(mii_config.model_conf.replica_configs):
        if replica.hostname in here:
            first = f"of replica {i}, counted from port_number"
            ports += [(first, port) for port in replica.tensor_parallel_ports]
            ports.append(("torch_dist_port", replica.torch_dist_port))
    return ports


def _check_ports(mii_config) -> None:
    """Raises ``OSError`` or ``ValueError`` that names a port which is taken, or wanted twice."""
    ports = _ports(mii_config)
    for field, port in ports:
        if not is_free(port):
            raise OSError(errno.EADDRINUSE, f"port {port} ({field}) is in use")
    for port, uses in Counter(port for _, port in ports).items():
        if uses > 1:
            raise ValueError(f"port {port} is wanted {uses} times: {[field for field, p in ports if p == port]}")


def _check_model(mii_config) -> None:
    """Raises ``ValueError`` for a model or a tensor-parallel degree that its ranks would refuse."""
    from deepspeed.accelerator import get_accelerator
    from transformers import AutoConfig

    model = mii_config.model_conf
    ranks, devices = model.tensor_parallel * model.replica_num, get_accelerator().device_count()
    unplaced = model.device_map == "auto" and not os.path.isfile(mii_config.hostfile)
    if not on_cpu() and unplaced and ranks > devices:
        raise ValueError(
            f"tensor_parallel {model.tensor_parallel} with replica_num {model.replica_num} needs {ranks} devices, "
            f"there are {devices}"
        )
    if os.path.isdir(model.model_name_or_path):
        refusals.check(AutoConfig.from_pretrained(model.model_name_or_path), on_cpu(), model.tensor_parallel)


def _init(original, self, mii_config) -> None:
    """On a CPU, DeepSpeed counts a device for each NUMA node, and refuses to run more ranks than that."""
    _check_model(mii_config)
    self._mii_config = mii_config
    model = mii_config.model_conf
    if not on_cpu() or "LOCAL_SIZE" in os.environ:
        return original(self, mii_config)
    os.environ["LOCAL_SIZE"] = str(model.tensor_parallel * model.replica_num)
    try:
        return original(self, mii_config)
    finally:
        del os.environ["LOCAL_SIZE"]


def _launcher(original, self, replica_config, *args, **kwargs) -> str:
    """This interpreter's own ``deepspeed``, which need not be on the PATH, on the GPUs that this process sees.

    DeepSpeed's launcher counts GPUs from the machine's first and sets CUDA_VISIBLE_DEVICES anew, so a server beside
    others started on theirs. It gets the machine's own numbers instead, and no mask.
    """
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "").strip()
    masked = bool(seen) and not on_cpu() and replica_config.hostname == "localhost"
    if masked:
        indices = _machine_gpus(seen, replica_config.gpu_indices)
        replica_config = replica_config.model_copy(update={"gpu_indices": indices})
    name, _, arguments = original(self, replica_config, *args, **kwargs).partition(" ")
    own = f"{sys.executable} -m deepspeed.launcher.runner"
    unmask = "env -u CUDA_VISIBLE_DEVICES " if masked else ""
    return f"{unmask}{own if name == 'deepspeed' else name} {arguments}"


def _machine_gpus(seen: str, indices: list[int]) -> list[int]:
    """The machine's numbers of GPUs ``indices`` of those that ``CUDA_VISIBLE_DEVICES`` shows.

    Raises ``ValueError`` where it names them otherwise, which DeepSpeed's launcher cannot.
    """
    names = [name.strip() for name in seen.split(",")]
    if not all(name.isdigit() for name in names):
        raise ValueError(f"CUDA_VISIBLE_DEVICES={seen!r}: the deepspeed launcher knows GPUs by their numbers only")
    return [int(names[index]) for index in indices]


def _initialize_service(original, self, mii_config) -> list[subprocess.Popen]:
    """Has a guard run the commands that MII would run itself. Returns the guard's process alone."""
    from mii.backend import server

    _check_ports(mii_config)
    commands: list[list[str]] = []
    server.subprocess, usual = SimpleNamespace(Popen=commands.append), server.subprocess
    try:
        original(self, mii_config)
    finally:
        server.subprocess = usual
    commands = [[entry.__name__ if part == entry.MII_ENTRY else part for part in command] for command in commands]
    replicas = [f"replica {i}" for i in range(len(mii_config.model_conf.replica_configs))]
    names = [*replicas, guard.BALANCER, guard.GATEWAY][: len(commands)]
    directory = deployment_directory(mii_config.deployment_name)
    guard.clear(directory)
    log = open(os.environ[LOG], "ab") if os.environ.get(LOG) else None
    process = subprocess.Popen(
        [sys.executable, "-m", guard.__name__, str(directory)], stdin=subprocess.PIPE, stdout=log, stderr=log
    )
    if log is not None:
        log.close()
    process.stdin.write(json.dumps(list(zip(names, commands, strict=True))).encode())
    process.stdin.close()
    _guards[mii_config.deployment_name] = process
    return [process]


def end(deployment_name: str) -> None:
    """Ends all processes of a deployment that this process started, if it did, whatever they are doing."""
    process = _guards.pop(deployment_name, None)
    if process is not None:
        stop(process)


def stop(process: subprocess.Popen) -> None:
    """Ends a guard, which ends all that it started."""
    process.terminate()
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        guard.end_tree(process.pid)
        process.kill()
        process.wait()


def _wait_until_live(_original, self, processes, deployment) -> None:
    """Waits until all ports of the deployment are open. Raises ``ServerFailed`` with the reason if it ends before."""
    (process,) = processes
    config = self._mii_config
    waiting = {(replica.hostname, port) for replica in deployment for port in replica.tensor_parallel_ports}
    waiting.add(("localhost", config.port_number))
    if config.enable_restful_api:
        waiting.add((config.restful_api_host, config.restful_api_port))
    limit = float(os.environ.get(START_LIMIT) or "inf")
    deadline = time.monotonic() + limit
    try:
        while waiting:
            if time.monotonic() > deadline:
                raise ServerFailed(f"the server of {config.model_conf.model_name_or_path} did not start in {limit:g} s")
            if process.poll() is not None:
                reason = guard.failure(deployment_directory(config.deployment_name)) or guard.status_text(
                    process.returncode
                )
                raise ServerFailed(f"the server of {config.model_conf.model_name_or_path} did not start: {reason}")
            waiting = {address for address in waiting if not answers(*address)}
            time.sleep(0.1)
    except BaseException:
        stop(process)
        raise
    # Nobody else takes note of its end.
    threading.Thread(target=process.wait, daemon=True).start()


def _wrap_start() -> None:
    from mii.backend.server import MIIServer

    wrap(MIIServer, "__init__", _init)
    wrap(MIIServer, "_generate_ds_launch_str", _launcher)
    wrap(MIIServer, "_initialize_service", _initialize_service)
    wrap(MIIServer, "_wait_until_server_is_live", _wait_until_live)


def check_port(port: int) -> None:
    """Raises ``OSError`` for a port in use. gRPC shares it with whoever else listens, and each gets some requests."""
    if not is_free(port):
        raise OSError(errno.EADDRINUSE, f"port {port} is in use")


def _do_serve(original, service_impl, port, interceptors=()) -> None:
    check_port(port)
    original(service_impl, port, list(interceptors))


def _service_init(original, self, async_pipeline=None) -> None:
    """A rank whose generation thread has ended serves no more."""
    original(self, async_pipeline=async_pipeline)

    def end() -> None:
        async_pipeline.thread.join()
        time.sleep(LAST_WORDS)
        self.get_stop_event().set()

    threading.Thread(target=end, daemon=True).start()


def _serve_inference(original, async_pipeline, port) -> None:
    original(async_pipeline, port)
    try:
        check_running(async_pipeline)
    except RuntimeError:
        # Threads that still wait for something must not keep the process.
        last = threading.Timer(PATIENCE, os._exit, (1,))
        last.daemon = True
        last.start()
        raise


def _generate(original, self):
    """MII's first rank asks for requests as fast as it can, and so keeps a core busy that the others may need."""
    from mii.batching.ragged_batching import MIIAsyncPipeline

    queue = self.request_queue
    if type(self) is MIIAsyncPipeline and self.is_rank_0 and is_idle(self):
        with queue.not_empty:
            if not queue.queue:
                queue.not_empty.wait(IDLE)
    return original(self)


def _join_deployment() -> None:
    """In a process of a deployment, an exception that ends it is left for the guard to read, and it ends with that."""
    if guard.VARIABLE not in os.environ:
        return
    guard.end_with_guard()
    directory, usual = Path(os.environ[guard.VARIABLE]), sys.excepthook

    def excepthook(kind, error, traceback) -> None:
        guard.record(directory, error)
        usual(kind, error, traceback)

    sys.excepthook = excepthook


def _wrap_processes() -> None:
    from mii.batching.ragged_batching import MIIAsyncPipeline
    from mii.grpc_related import modelresponse_server

    _join_deployment()
    wrap(MIIAsyncPipeline, "generate", _generate)
    wrap(modelresponse_server, "_do_serve", _do_serve)
    wrap(modelresponse_server, "serve_inference", _serve_inference)
    wrap(modelresponse_server.ModelResponse, "__init__", _service_init)


HOOKS = (
    Hook("mii.backend.server.MIIServer", "its checks, its launcher, its ranks, its end", _wrap_start),
    Hook("mii.grpc_related.modelresponse_server", "ports, and ranks that fail", _wrap_processes),
)
