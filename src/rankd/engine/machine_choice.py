"""Which target is the fastest on this machine: `rankd bench engine` writes it down, `target = "auto"` reads it."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from pathlib import Path

import msgspec

from rankd.engine.backend import Precision


class MachineChoice(msgspec.Struct, frozen=True):
    """Milliseconds of one cold request by "target precision", on one kind of machine."""

    machine: str
    workload: str
    p50_ms: dict[str, float]


def choice_key(target: str, precision: Precision) -> str:
    """How a target and a precision are called in the file."""
    return f"{target} {precision.value}"


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


def fastest_target(usable: Mapping[str, Precision]) -> str | None:
    """The fastest target, each in its precision, as measured here; None if nothing of them was measured here."""
    try:
        choice = msgspec.json.decode(choice_file().read_bytes(), type=MachineChoice)
    except (OSError, msgspec.MsgspecError):
        return None
    wanted = {target: choice_key(target, precision) for target, precision in usable.items()}
    measured = {target: choice.p50_ms[key] for target, key in wanted.items() if key in choice.p50_ms}
    if choice.machine != this_machine() or not measured:
        return None
    return min(measured, key=lambda target: measured[target])
