"""Ports for servers that have to be told theirs, or that come back to it after a fault."""

from __future__ import annotations

import itertools
import os
import socket

FIRST, LAST = 20_000, 32_000  # below those that Linux gives to clients, of which some tests have thousands at once
_WORKERS = 8  # of pytest, each with ports of its own
_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % _WORKERS
_EACH = (LAST - FIRST) // _WORKERS
_TURNS = itertools.count(os.getpid())  # another run of the tests begins elsewhere


def free_port() -> int:
    """A port of loopback that nobody uses, and that nobody takes while its server is away."""
    for _ in range(_EACH):
        port = FIRST + _WORKER * _EACH + next(_TURNS) % _EACH
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
    raise AssertionError(f"all of {_EACH} ports are in use")
