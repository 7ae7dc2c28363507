"""What a supervisor says of its process."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Annotated

import msgspec
from msgspec import Meta


class ProcessState(Enum):
    """Where a process is in its life."""

    STARTING = "starting"  # it was started, for the first time or again, and has not answered yet
    UP = "up"
    SILENT = "silent"  # it was up and does not answer; it is killed after some misses
    ENDED = "ended"  # it was asked to go


class ProcessReport(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`restarts` since the start. `recovery_s`: how long it was away last, from when it was missed first until it
    answered again. `generation` is that of the placement that a ranking server uses; `trouble` what was wrong last."""

    state: ProcessState
    address: str = ""
    pid: int = 0
    node: str = ""
    host: str = ""
    restarts: Annotated[int, Meta(ge=0)] = 0
    recovery_s: float | None = None
    generation: int = 0
    trouble: str = ""


Reports = Mapping[str, tuple[ProcessReport, int]]
"""By the process's name; beside it the generation of the last placement that a ranking server was told."""
