"""Ports of this machine: whether one can be listened on, whether somebody does, and some that a server may have."""

from __future__ import annotations

import random
import socket
from pathlib import Path

#: The lowest port that is chosen, and that of connections where the system does not say: Linux's default.
LOWEST, CONNECTIONS = 10000, 32768
#: Below so many there are too few to choose from.
ENOUGH = 20000
LINUX_SAYS = Path("/proc/sys/net/ipv4/ip_local_port_range")


def is_free(port: int) -> bool:
    """Whether a server could listen on ``port``. Connections that linger after a close do not count."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def answers(host: str, port: int) -> bool:
    """Whether somebody listens on a port. To ask a port that nobody has may connect the asking socket to itself: the
    kernel gives it a port of its own, which may be that very one.
    """
    with socket.socket() as probe:
        return probe.connect_ex((host, port)) == 0 and probe.getsockname() != probe.getpeername()


def free_ports(count: int) -> int:
    """The first of ``count`` neighbouring ports that are free, below those that the system gives to connections: a
    server that has yet to load its model listens only minutes later, and any connection could take its port meanwhile.
    Where connections may have nearly all ports, any.
    """
    below = int(LINUX_SAYS.read_text().split()[0]) if LINUX_SAYS.exists() else CONNECTIONS
    if below < ENOUGH:
        below = 2**16
    while True:
        first = random.randrange(LOWEST, below - count)
        if all(is_free(port) for port in range(first, first + count)):
            return first
