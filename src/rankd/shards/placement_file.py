"""A placement: a plan, and where its shards are now. A file that is replaced as a whole tells a running server.

Whoever deploys writes it; `live_tables.py` reads it again when it has changed. `generation` goes up at each change.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from rankd.config import read_struct
from rankd.errors import ConfigError
from rankd.plan.plan_file import PlanFile, check_plan_file


class Placement(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`shards`: of each shard of the plan, in its order, the addresses "host:port" of its replicas."""

    generation: Annotated[int, Meta(ge=1)]
    plan: PlanFile
    shards: tuple[tuple[str, ...], ...]


def read_placement(path: Path) -> Placement:
    """A placement with a plan that holds together and addresses of each of its shards.

    Raises:
        ConfigError: unreadable, an unknown key or a bad value, a plan that `read_plan` would refuse, or other shards.
    """
    found = read_struct(Placement, path)
    check_plan_file(found.plan, str(path))
    planned = len(found.plan.plan.shards)
    if len(found.shards) != planned or not all(found.shards):
        raise ConfigError(
            f"{path}: the plan has {planned} shards, and there are addresses of {sum(map(bool, found.shards))}; give "
            "at least one of each"
        )
    return found


def write_placement(path: Path, placement: Placement) -> None:
    """Put a placement in the file's place at once: who reads sees the old one or the new one, never a part.

    Raises:
        ConfigError: the file cannot be written.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("wb") as file:
            file.write(msgspec.json.format(msgspec.json.encode(placement), indent=1))
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror or error}") from error
