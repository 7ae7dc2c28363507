"""What `rankd deploy status` shows."""

from __future__ import annotations

import msgspec

from rankd.deploy.process_report import ProcessReport


class ProcessStatus(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A process; `shard` is None for a ranking server, `report` for a process whose agent does not answer: Ray is
    starting or moving it."""

    name: str
    shard: int | None
    report: ProcessReport | None


class DeploymentStatus(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`plan` is the name of the plan in use, `generation` that of the newest placement; `change` is under way, or
    empty."""

    name: str
    plan: str
    generation: int
    change: str
    processes: tuple[ProcessStatus, ...]
