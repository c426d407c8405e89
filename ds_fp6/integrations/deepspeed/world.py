"""The world of ranks of a process that no launcher started: itself."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator

#: By which a launcher tells a process its place.
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@contextlib.contextmanager
def stand_alone(ranks: int) -> Iterator[None]:
    """A process that no launcher started is its own world meanwhile. DeepSpeed would ask mpi4py.

    The variables that say so are gone afterwards: left behind, as MII leaves them, they tell every process that this
    one starts that it is a rank, and which port to meet the others on.
    """
    if ranks != 1 or "RANK" in os.environ:
        yield
        return
    before = {name: os.environ.get(name) for name in LAUNCHER_VARIABLES}
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    own = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    for name, value in own.items():
        os.environ.setdefault(name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
