"""Which target is the fastest on this machine: `rankd bench engine` writes it down, `target = "auto"` reads it."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec


class MachineChoice(msgspec.Struct, frozen=True):
    """Milliseconds of one request by target (cold, the target's fastest precision), on one kind of machine."""

    machine: str
    workload: str
    p50_ms: dict[str, float]


def choice_file() -> Path:
    """`$XDG_CACHE_HOME/rankd/engine.json`, usually under ~/.cache."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "rankd" / "engine.json"


def this_machine() -> str:
    """What tells kinds of machines apart: the processor and the number of cores."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith(("model name", "flags"))]
    return f"{platform.machine()} {os.cpu_count()} {' '.join(names[:2])}"


def write_choice(workload: str, p50_ms: Mapping[str, float]) -> Path:
    """Keep what was measured; returns the file."""
    path = choice_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(f".{os.getpid()}")
    beside.write_bytes(msgspec.json.encode(MachineChoice(this_machine(), workload, dict(p50_ms))))
    beside.replace(path)
    return path


def fastest_target(usable: Sequence[str]) -> str | None:
    """The fastest of the usable targets as measured here; None if nothing of them was measured here."""
    try:
        choice = msgspec.json.decode(choice_file().read_bytes(), type=MachineChoice)
    except (OSError, msgspec.MsgspecError):
        return None
    measured = {target: ms for target, ms in choice.p50_ms.items() if target in usable}
    if choice.machine != this_machine() or not measured:
        return None
    return min(measured, key=lambda target: measured[target])
