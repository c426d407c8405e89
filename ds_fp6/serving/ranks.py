"""The processes of a tensor-parallel server: rank 0 answers requests, the others compute their part of each layer.

A launcher may have started them. Otherwise the process that was started becomes rank 0 and starts the others, which
run the same command. They end when rank 0 tells them, and when it disappears.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Sequence

from ds_fp6.integrations.deepspeed.world import LAUNCHER_VARIABLES

#: Set in ranks that rank 0 started: their standard input ends when rank 0 does.
STARTED_BY_RANK_0 = "DS_FP6_STARTED_BY_RANK_0"

#: Seconds that a rank has to end by itself once rank 0 has ended its work.
PATIENCE = 10


def launched() -> bool:
    """Whether a launcher, or rank 0, has given this process its rank."""
    return all(name in os.environ for name in LAUNCHER_VARIABLES)


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Ranks:
    """Ranks 1 and up of this machine, started with ``command``; this process takes rank 0's environment.

    Args:
        count: ranks in all, this one included.
        on_death: is called, in another thread, with an error that tells of a rank that ended too early.
    """

    def __init__(self, command: Sequence[str], count: int, on_death: Callable[[RuntimeError], None]) -> None:
        self._on_death = on_death
        self._ending = False
        common = {
            "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "LOCAL_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()),
        }  # fmt: skip
        os.environ.update(common, RANK="0", LOCAL_RANK="0")
        self.processes = [
            subprocess.Popen(
                command, stdin=subprocess.PIPE,
                env={**os.environ, "RANK": str(i), "LOCAL_RANK": str(i), STARTED_BY_RANK_0: "1"},
            )
            for i in range(1, count)
        ]  # fmt: skip
        for i, process in enumerate(self.processes, start=1):
            threading.Thread(target=self._watch, args=(i, process), name=f"watch-{i}", daemon=True).start()

    def _watch(self, number: int, process: subprocess.Popen) -> None:
        status = process.wait()
        if not self._ending:
            how = f"signal {-status}" if status < 0 else f"status {status}"
            self._on_death(RuntimeError(f"rank {number} of the model (process {process.pid}) ended with {how}"))

    def expect_end(self) -> None:
        """From now on ranks may end."""
        self._ending = True

    def stop(self, patience: float = PATIENCE) -> None:
        """Waits for the ranks to end, and ends those that do not."""
        self.expect_end()
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(patience)
        for process in self.processes:
            process.kill()
            process.wait()
            process.stdin.close()


def stay_with_rank_0(patience: float) -> None:
    """For ranks other than 0: they outlive no rank 0, and leave it to rank 0 what a signal to all of them means.

    A launcher's signals reach every rank. Rank 0 then finishes what runs, for which it needs the others: they end
    ``patience`` seconds later at the latest.
    """

    def give_up_later(*_arguments: object) -> None:
        timer = threading.Timer(patience, os._exit, [1])
        timer.daemon = True
        timer.start()

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, give_up_later)
    if STARTED_BY_RANK_0 in os.environ:
        threading.Thread(target=_end_with_standard_input, name="rank-0", daemon=True).start()


def _end_with_standard_input() -> None:
    # Not sys.stdin, whose lock this thread would hold when the interpreter ends.
    while os.read(0, 1):
        pass
    os._exit(1)
