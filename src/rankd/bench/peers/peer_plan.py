"""What the process of a peer is told, handed on to its workers by an environment variable."""

from __future__ import annotations

import os

import msgspec

VARIABLE = "RANKD_BENCH_PEER"


class PeerPlan(msgspec.Struct, frozen=True):
    """A version folder, where to listen, how many workers there are, up to how many requests they take at once,
    waiting for so long for the last of them, and whether they keep users' states."""

    model: str
    port: int
    workers: int
    batch: int
    wait_ms: int
    states: bool
    host: str = "127.0.0.1"

    def variables(self) -> dict[str, str]:
        """For the environment of the process."""
        return {VARIABLE: msgspec.json.encode(self).decode()}


def read_plan() -> PeerPlan:
    """The plan that this process, or the one that started it, was given."""
    return msgspec.json.decode(os.environ[VARIABLE], type=PeerPlan)
