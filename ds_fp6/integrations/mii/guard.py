"""A process that starts all others of a deployment, and ends them all once one of them has ended.

    python -m ds_fp6.integrations.mii.guard DIRECTORY < commands.json

commands.json is a list of ``[name, [argument, ...]]``. DIRECTORY is where the deployment's processes leave word of
what went wrong, see ``failure``. Imports nothing heavy.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil

#: Name the deployment's directory and its guard to its processes.
VARIABLE = "DS_FP6_DEPLOYMENT"
PROCESS_VARIABLE = "DS_FP6_DEPLOYMENT_GUARD"
#: A process that the deployment is not to outlive, by its id; without it, the deployment ends when it is told to.
OWNER_VARIABLE = "DS_FP6_SERVER_OWNER"
#: Seconds that processes have to end by themselves once one of them did, after ``terminate_server``.
PATIENCE = 20
#: Seconds between a failure and the end of the load balancer, which tells the clients.
FAREWELL = 3
#: Seconds between SIGTERM and SIGKILL.
INSISTENCE = 5

BALANCER, GATEWAY = "the load balancer", "the RESTful gateway"

_FAILURE = "failure.txt"
_PR_SET_CHILD_SUBREAPER = 36


def clear(directory: Path) -> None:
    """Makes ``directory`` ready for a new start."""
    directory.mkdir(parents=True, exist_ok=True)
    for path in (directory / _FAILURE, *directory.glob("error-*.txt")):
        path.unlink(missing_ok=True)


def record(directory: Path, error: BaseException) -> None:
    """Called by a process of the deployment that ends because of ``error``."""
    rank = os.environ.get("RANK")
    where = f"rank {rank}: " if rank is not None and int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
    (directory / f"error-{os.getpid()}.txt").write_text(f"{where}{type(error).__name__}: {error}")


def failure(directory: Path, wait: float = 0.0) -> str | None:
    """Why the deployment failed, once its guard has said so; waits up to ``wait`` seconds for that."""
    deadline = time.monotonic() + wait
    while True:
        with contextlib.suppress(OSError):
            return (directory / _FAILURE).read_text()
        if time.monotonic() >= deadline:
            return None
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    """Whether a process is there, and not only because its parent has yet to take note of its end."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def end_with_guard() -> None:
    """Ends this process, which belongs to a deployment, soon after the deployment's guard is gone."""
    guard = int(os.environ[PROCESS_VARIABLE])

    def watch() -> None:
        while is_running(guard):
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def status_text(status: int) -> str:
    """What an exit status says. DeepSpeed's launcher ends with 256 - n where signal n has ended a rank."""
    number = -status if status < 0 else 256 - status if status > 192 else None
    if number is None:
        return f"ended with status {status}"
    try:
        return f"was ended by {signal.Signals(number).name}"
    except ValueError:
        return f"ended with status {status}"


class Guard:
    """The processes of a deployment, by name."""

    def __init__(self, directory: Path, commands: list[tuple[str, list[str]]]) -> None:
        self._directory = directory
        with contextlib.suppress(OSError, AttributeError):
            # Whoever loses its parent becomes a child of this process, and is found among its children.
            ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        environment = {**os.environ, VARIABLE: str(directory), PROCESS_VARIABLE: str(os.getpid())}
        self._processes = {name: subprocess.Popen(command, env=environment) for name, command in commands}

    def watch(self) -> int:
        """Returns when every process has ended: 0 if they were told to or have lost their owner, 1 after a failure."""
        owner = int(os.environ.get(OWNER_VARIABLE) or 0)
        while not owner or is_running(owner):
            for name, process in self._processes.items():
                status = process.poll()
                if status == 0:
                    return self._finish()
                if status is not None:
                    return self._fail(name, status)
            time.sleep(0.1)
        self.end()
        return 0

    def _finish(self) -> int:
        deadline = time.monotonic() + PATIENCE
        # The gateway is told to end in a child that it forked for the request, and so never learns of it.
        others = [process for name, process in self._processes.items() if name != GATEWAY]
        while time.monotonic() < deadline and any(process.poll() is None for process in others):
            time.sleep(0.1)
        self.end()
        return 0

    def _fail(self, name: str, status: int) -> int:
        errors = sorted(self._directory.glob("error-*.txt"), key=lambda path: path.stat().st_mtime)
        reason = f"{name} {status_text(status)}" + (f": {errors[0].read_text()}" if errors else "")
        partial = self._directory / f"{_FAILURE}.new"
        partial.write_text(reason)
        partial.rename(self._directory / _FAILURE)
        print(f"ds_fp6: the server ends: {reason}", file=sys.stderr, flush=True)
        balancers = [p.pid for name, p in self._processes.items() if not name.startswith("replica")]
        end_tree(os.getpid(), spare=balancers)
        time.sleep(FAREWELL)
        self.end()
        return 1

    def end(self) -> None:
        end_tree(os.getpid())
        for process in self._processes.values():
            process.poll()


def end_tree(pid: int, spare: list[int] | None = None) -> None:
    """Ends all descendants of process ``pid``, first with SIGTERM, but for those of ``spare``."""
    doomed = [p for p in psutil.Process(pid).children(recursive=True) if p.pid not in (spare or [])]
    for send in (psutil.Process.terminate, psutil.Process.kill):
        for process in doomed:
            with contextlib.suppress(psutil.Error):
                send(process)
        _, doomed = psutil.wait_procs(doomed, timeout=INSISTENCE)


def main() -> int:
    directory, commands = Path(sys.argv[1]), json.load(sys.stdin)

    def stop(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    guard = Guard(directory, commands)
    try:
        return guard.watch()
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        guard.end()


if __name__ == "__main__":
    sys.exit(main())
